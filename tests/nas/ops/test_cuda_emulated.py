"""The CUDA kernels of csrc/cuda, run on the host (tests/cuda_emulation), against the eager cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import emulated_cells
import native_chains
import native_stems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from native_cells import CHOICES, INPUTS, Call, assert_close, calls, draw_call, run, same_bits
from torch import Tensor

from nas.errors import NativeError
from nas.ops import mixed, stem
from nas.ops.mixed import CellPlan, Statistics

NAN, INFINITY = float("nan"), float("inf")
FULL = CellPlan(6, 5, 8, 1, reduction=False, previous_reduction=False)
PARTIAL = CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=True)
WIDE = CellPlan(8, 16, 16, 1, reduction=True, previous_reduction=True)  # 16 bytes at a time
WIDE_PARTIAL = CellPlan(16, 8, 32, 4, reduction=False, previous_reduction=True)
FIRST = CellPlan(16, 8, 16, 4, reduction=False, previous_reduction=False)  # of PC-DARTS
PLANS = {
    "full": FULL,
    "partial": PARTIAL,
    "wide": WIDE,
    "wide-partial": WIDE_PARTIAL,
    "wide-partial-reduction": replace(WIDE_PARTIAL, reduction=True),
    "first": FIRST,
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
modes = pytest.mark.parametrize("training", [True, False])


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    try:
        emulated_cells.load()
    except NativeError as error:
        pytest.skip(f"cannot compile the emulation: {error}")


def compare(call: Call) -> dict[str, Tensor]:
    """Outputs, statistics and gradients of both twins; those of the kernels."""
    ours = run(emulated_cells.mixed_cells, call)
    assert_close(ours, run(mixed.mixed_cells, call))
    return ours


# ---- any shape ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=calls())
def test_cuda_equals_eager_for_any_shape(call: Call) -> None:
    compare(call)


@plans
@pytest.mark.parametrize("choice", CHOICES)
@modes
def test_cuda_equals_eager(plan: CellPlan, choice: str, training: bool) -> None:
    call = draw_call(plan, 3, training=training, edges=plan.partial > 1, choice=choice)
    ours = compare(call)
    if call.active is not None:
        assert not ours["operations"][~call.active].any()


@pytest.mark.parametrize("partial", [1, 2, 4, 8])
@pytest.mark.parametrize("mixed_channels", [3, 4, 8])
@pytest.mark.parametrize("reduction", [False, True])
def test_cuda_any_part_of_the_channels_is_mixed(
    partial: int, mixed_channels: int, reduction: bool
) -> None:
    """One by one or, where channels are even, two at a time; a quarter has kernels of its own."""
    plan = CellPlan(8, 4, mixed_channels * partial, partial, reduction, previous_reduction=False)
    compare(draw_call(plan, 3, (5, 7), edges=partial > 1))


tiles = pytest.mark.parametrize(
    ("plan", "images", "size"),
    [
        (WIDE, 1, (37, 41)),  # several tiles in each direction, the last one short
        (replace(WIDE, reduction=False), 2, (19, 33)),
        (WIDE_PARTIAL, 2, (35, 18)),
        (FULL, 23, (4, 3)),  # several images a tile, the last one short
        (CellPlan(4, 4, 64, 1, True, False), 2, (9, 9)),
        (CellPlan(4, 4, 132, 1, False, False), 1, (6, 7)),  # a slab of channels at a time
        (CellPlan(260, 4, 8, 1, False, True), 2, (3, 5)),  # a matrix in several pieces
    ],
    ids=["tiles", "wide-tiles", "partial-tiles", "images", "channels", "slabs", "matrix"],
)


@tiles
@modes
def test_cuda_tiles(plan: CellPlan, images: int, size: tuple[int, int], training: bool) -> None:
    compare(draw_call(plan, images, size, training=training, edges=plan.partial > 1))


@pytest.mark.parametrize(
    ("images", "size", "channels", "reduction", "reads"),
    [
        *[
            (images, size, channels, reduction, [1, 1, 1, 1, 1])
            for images in (64, 256)
            for size, channels, reduction in (
                *((32, 16, False), (16, 32, False), (8, 64, False)),
                *((32, 32, True), (16, 64, True)),
            )
        ],
        *[  # PC-DARTS at its own batch
            (256, size, channels, reduction, [1, 1, 1, 1, 1])
            for size, channels, reduction in (
                *((32, 4, False), (16, 8, False), (8, 16, False)),
                *((32, 8, True), (16, 16, True)),
            )
        ],
        (32, 8, 64, False, [1, 1, 2, 2, 2]),  # fewer tiles than keep a GPU busy
        (1, 2, 16, False, [18, 18, 14, 10, 6]),  # each convolution and pool for itself
        (64, 8, 128, False, []),  # slabs: a tile does not fit
    ],
)
def test_cuda_a_state_is_read_once_for_all_its_edges(
    images: int, size: int, channels: int, reduction: bool, reads: list[int]
) -> None:
    found = torch.ops.nas_transfer_emulated.reads(images, size, channels, reduction)
    assert found == reads


# From groups of some of a state's convolutions and pools, a block for each group and tile, to one
# block for all of them and all tiles; as on a GPU, each mostly has its own.
few_blocks = pytest.mark.parametrize("blocks", [40, 6, 1])


@pytest.mark.usefixtures("tf32")
@few_blocks
@pytest.mark.parametrize(
    ("plan", "images", "size"),
    [
        (PARTIAL, 5, (7, 9)),  # stride 2, odd sizes
        (WIDE, 3, (13, 11)),
        (replace(WIDE, reduction=False), 2, (17, 9)),
        (FULL, 23, (4, 3)),  # more images than a tile has
        (WIDE, 40, (1, 1)),
        (CellPlan(4, 4, 52, 1, True, False), 3, (7, 5)),  # a slab of channels at a time
        (CellPlan(4, 4, 64, 1, False, False), 3, (9, 8)),  # more sums than shared memory has
    ],
    ids=["stride", "wide", "tiles", "images", "pixels", "slabs", "sums"],
)
def test_cuda_blocks_that_do_more_of_the_work(
    blocks: int, plan: CellPlan, images: int, size: tuple[int, int]
) -> None:
    call = draw_call(plan, images, size, edges=plan.partial > 1)
    with emulated_cells.filled_by(blocks):
        compare(call)
        compare_tf32(call)


@few_blocks
@pytest.mark.parametrize("operations", [(1,), (2,), (1, 2), (3,), (4,), (5,), (6,), (7,), (2, 7)])
def test_cuda_operations_alone(blocks: int, operations: tuple[int, ...]) -> None:
    """A tile's border is then that of what is left."""
    for plan in (WIDE_PARTIAL, PARTIAL):
        call = draw_call(plan, 5, (5, 7), edges=True, choice="nothing")
        active = call.active.clone()  # type: ignore[union-attr]
        active[:, operations] = True
        with emulated_cells.filled_by(blocks):
            compare(replace(call, active=active, operations=active.double()))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
@plans
def test_cuda_smallest_images(plan: CellPlan, size: tuple[int, int]) -> None:
    for images, training in ((1, False), (5, True)):
        compare(draw_call(plan, images, size, missing=(1, 1), training=training, edges=True))


def test_cuda_without_a_backward_pass_keeps_nothing() -> None:
    call = draw_call(FULL, 3)
    quiet = run(emulated_cells.mixed_cells, call, needed=())
    whole = run(emulated_cells.mixed_cells, call)
    assert same_bits(quiet, {name: whole[name] for name in quiet})


@pytest.mark.parametrize(
    "needed", [("operations", "edges"), ("weights",), ("before",), ("previous",)], ids="+".join
)
@modes
def test_cuda_gradients_that_nobody_asks_for_are_not_computed(
    needed: tuple[str, ...], training: bool
) -> None:
    """And the others have the same bits as if all were."""
    call = draw_call(PARTIAL, 3, training=training, edges=True)
    whole, part = (
        run(emulated_cells.mixed_cells, call, needed=names) for names in (INPUTS, needed)
    )
    assert set(part) & set(INPUTS) == set(needed)
    assert all(torch.equal(part[name], whole[name]) for name in part)


# ---- numbers ----


def test_cuda_means_far_from_zero_do_not_cancel() -> None:
    call = draw_call(FULL)
    call.previous.add_(1e4)
    ours, theirs = (run(twin, call) for twin in (emulated_cells.mixed_cells, mixed.mixed_cells))
    torch.testing.assert_close(
        ours["running variance"], theirs["running variance"], rtol=1e-10, atol=0
    )


@plans
@modes
def test_cuda_ties_of_max_pooling_go_where_eager_sends_them(plan: CellPlan, training: bool) -> None:
    call = draw_call(plan, 6, (9, 8), training=training, edges=True, choice="nothing")
    active = call.active.clone()  # type: ignore[union-attr]
    active[[0, 1, 4], 1] = True  # both inputs to node 2, and node 2 to node 3
    compare(
        replace(
            call,
            active=active,
            operations=active.double(),
            before=call.before.sign(),
            previous=call.previous.sign(),
            mean=torch.zeros_like(call.mean),
            weights=call.weights.sign(),
        )
    )


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("where", ["before", "previous"])
@modes
def test_cuda_what_is_not_finite_spreads_as_in_eager(
    value: float, where: str, training: bool
) -> None:
    for choice in ("all", "some", "one-each"):
        call = draw_call(FULL, 3, (9, 8), training=training, choice=choice)
        getattr(call, where)[1, 1, 4, 2] = value
        ours, theirs = (run(twin, call) for twin in (emulated_cells.mixed_cells, mixed.mixed_cells))
        torch.testing.assert_close(
            ours["output"], theirs["output"], rtol=1e-9, atol=1e-9, equal_nan=True
        )
        for name, expected in theirs.items():
            assert not (ours[name].isfinite() & ~expected.isfinite()).any(), name


@plans
@modes
def test_cuda_single_precision_is_as_good_as_that_of_eager(plan: CellPlan, training: bool) -> None:
    call = draw_call(plan, 4, (9, 8), training=training, edges=plan.partial > 1)
    call = call.to(torch.float32).to(torch.float64)  # the same numbers in both precisions
    exact, single = run(mixed.mixed_cells, call), call.to(torch.float32)
    ours, theirs = (run(twin, single) for twin in (emulated_cells.mixed_cells, mixed.mixed_cells))
    for name, value in ours.items():
        assert value.dtype == torch.float32
        norm = exact[name].norm()
        error, limit = ((x.double() - exact[name]).norm() / norm for x in (value, theirs[name]))
        assert error <= 3 * limit + 1e-7, name


@pytest.fixture
def tf32() -> Iterator[None]:
    with emulated_cells.on_tensor_cores():
        yield


def rounded(x: Tensor) -> Tensor:
    """The nearest number of 11 bits, in ``x``'s own type."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


class RoundedProduct(torch.autograd.Function):
    """``x @ weight`` of rounded factors, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = rounded(x), rounded(weight)
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = rounded(gradient)
        return gradient @ weight.T, x.flatten(0, -2).T @ gradient.flatten(0, -2)


def rounded_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Twin of :func:`nas.ops.mixed.pointwise` on tensor cores."""
    return RoundedProduct.apply(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def compare_tf32(call: Call) -> None:
    """With eager whose factors are rounded alike. Where sums lie between two roundings, it differs
    by 4e-4, as eager in single precision does; some rectifications then choose otherwise."""
    call = call.to(torch.float32)
    ours = run(emulated_cells.mixed_cells, call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "pointwise", rounded_pointwise)
        exact = run(mixed.mixed_cells, call.to(torch.float64))
    for name, expected in exact.items():
        assert ours[name].dtype == torch.float32, name
        errors = (ours[name].double() - expected).abs() / expected.square().mean().sqrt()
        assert float(errors.median()) <= 1e-3, name
        assert float(errors.square().mean().sqrt()) <= (1e-3 if name == "output" else 0.06), name


@pytest.mark.usefixtures("tf32")
@plans
@modes
def test_cuda_tensor_cores_stay_within_their_rounding(plan: CellPlan, training: bool) -> None:
    compare_tf32(draw_call(plan, 4, (9, 8), training=training, edges=plan.partial > 1))


@pytest.mark.usefixtures("tf32")
@tiles
def test_cuda_tensor_cores_on_tiles(plan: CellPlan, images: int, size: tuple[int, int]) -> None:
    compare_tf32(draw_call(plan, images, size, edges=plan.partial > 1))


def test_cuda_tensor_cores_are_used_where_they_are_allowed(
    request: pytest.FixtureRequest,
) -> None:
    call = draw_call(WIDE, 2).to(torch.float32)
    plain = run(emulated_cells.mixed_cells, call)
    request.getfixturevalue("tf32")
    rounded = run(emulated_cells.mixed_cells, call)
    assert not torch.equal(plain["output"], rounded["output"])
    double = call.to(torch.float64)
    assert_close(run(emulated_cells.mixed_cells, double), run(mixed.mixed_cells, double))
    assert same_bits(run(emulated_cells.mixed_cells, call), rounded)


# Roundings of 2^-9 and 2^-12 each, some ten in a row; near ties ReLU and pools choose differently,
# which moves whole gradients.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.015)], ids=["bf16", "half"]
)
@plans
@modes
def test_cuda_half_precision_stays_within_its_rounding(
    plan: CellPlan, dtype: torch.dtype, tolerance: float, training: bool
) -> None:
    call = draw_call(plan, 4, (9, 8), training=training, edges=plan.partial > 1)
    narrow = call.narrowed(dtype)
    ours = run(emulated_cells.mixed_cells, narrow)
    wide = narrow.to(torch.float64)
    exact = run(mixed.mixed_cells, wide)
    for name, expected in exact.items():
        images = name in ("output", "before", "previous")
        assert ours[name].dtype == (dtype if images else torch.float32), name
        error = (ours[name].double() - expected).norm() / expected.norm()
        assert error <= (tolerance if name == "output" else 10 * tolerance), (name, error)


def test_cuda_cells_of_a_chain() -> None:
    """One call for all of them: what each is given and keeps, and where gradients meet."""
    plans = native_chains.CHAINS["after-a-reduction"]
    inputs = native_chains.draw_inputs(plans, size=(4, 3))
    theirs = native_chains.run(mixed.mixed_cells, plans, inputs)
    assert_close(native_chains.run(emulated_cells.mixed_cells, plans, inputs), theirs)
    part = native_chains.run(emulated_cells.mixed_cells, plans, inputs, needed=())
    assert_close(part, {name: theirs[name] for name in part})


@pytest.mark.parametrize("blocks", [528, 6])
def test_cuda_bits_repeat(blocks: int) -> None:
    for plan in PLANS.values():
        call = draw_call(plan, 5, (9, 8), edges=True).to(torch.float32)
        with emulated_cells.filled_by(blocks):
            first = run(emulated_cells.mixed_cells, call)
            assert same_bits(run(emulated_cells.mixed_cells, call), first)


# ---- the stem ----


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 7),
    inputs=st.sampled_from([1, 2, 3, 5]),
    outputs=st.sampled_from([3, 6, 24, 48, 81]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    training=st.booleans(),
)
def test_cuda_stem_equals_eager(
    images: int, inputs: int, outputs: int, size: tuple[int, int], training: bool
) -> None:
    assume(not training or images * size[0] * size[1] > 1)
    values = native_stems.draw(images, inputs, outputs, size)
    ours, theirs = (
        native_stems.run(twin, values, training=training)
        for twin in (emulated_cells.stem, stem.stem)
    )
    assert_close(ours, theirs)


def test_cuda_stem_of_many_blocks_repeats_its_bits() -> None:
    """And of more pixels than the blocks take at once, of wide images."""
    values = {name: x.float() for name, x in native_stems.draw(40, 3, 48, (48, 40)).items()}
    ours, again = (native_stems.run(emulated_cells.stem, values) for _ in range(2))
    assert same_bits(ours, again)
    exact = native_stems.run(stem.stem, {name: x.double() for name, x in values.items()})
    for name, value in exact.items():
        assert (ours[name].double() - value).norm() <= 1e-6 * value.norm(), name


def test_cuda_stem_stores_bfloat16() -> None:
    values = {name: x.float() for name, x in native_stems.draw(3, 3, 20, (7, 5)).items()}
    half = native_stems.run(emulated_cells.stem, values, stored=torch.bfloat16)
    exact = native_stems.run(stem.stem, {name: x.double() for name, x in values.items()})
    assert half["output"].dtype == torch.bfloat16
    for name, value in exact.items():
        assert (half[name].double() - value).norm() <= 1e-2 * value.norm(), name


# ---- arguments ----


def test_cuda_obeys_the_newer_switch_of_tensor_cores_too() -> None:
    """After which PyTorch does not tell any more what the older one says."""
    call = draw_call(WIDE, 2).to(torch.float32)
    plain = run(emulated_cells.mixed_cells, call)
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert not same_bits(run(emulated_cells.mixed_cells, call), plain)
        products.fp32_precision = "ieee"
        assert same_bits(run(emulated_cells.mixed_cells, call), plain)
    finally:
        products.fp32_precision = before


def test_cuda_types_that_do_not_go_together_are_refused() -> None:
    call = draw_call(FULL)
    for weights, images, message in (
        (torch.float64, torch.bfloat16, "previous must be Double as `weights` is, not BFloat16"),
        (torch.float32, torch.float64, "previous must be Float as `weights` is, not Double"),
        (torch.bfloat16, torch.bfloat16, "weights must be float32 or float64, not BFloat16"),
    ):
        parameters = call.to(weights)
        with pytest.raises(RuntimeError, match=message):
            emulated_cells.mixed_cells(
                [call.plan],
                call.before.to(images),
                call.previous.to(images),
                parameters.weights,
                Statistics(parameters.mean, parameters.variance, training=True),
                parameters.operations.unsqueeze(0),
            )

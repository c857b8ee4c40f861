"""The native cell: the same bits always, NaN and infinity as in eager, and arguments refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_cells import CHOICES, Call, draw_call, recorded, run, same_bits
from torch import Tensor

from nas.ops import build, mixed, native
from nas.ops.mixed import CellPlan

pytestmark = pytest.mark.usefixtures("native")

FULL = CellPlan(3, 6, 8, 1, reduction=False, previous_reduction=False)
REDUCING = CellPlan(6, 3, 16, 1, reduction=True, previous_reduction=False)
PARTIAL = CellPlan(5, 6, 8, 2, reduction=True, previous_reduction=True)
QUARTER = CellPlan(5, 6, 16, 4, reduction=False, previous_reduction=True)
PLANS = {"full": FULL, "reducing": REDUCING, "partial": PARTIAL, "quarter": QUARTER}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
NAN, INFINITY = float("nan"), float("inf")


# ---- the same bits ----


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_the_number_of_threads(plan: CellPlan, dtype: torch.dtype) -> None:
    call = draw_call(plan, 19, edges=True).to(dtype)  # more blocks than threads, and a short one
    torch.set_num_threads(1)
    expected = run(native.mixed_cells, call)
    for count in (2, 3, 1):
        torch.set_num_threads(count)
        for _ in range(2):
            assert same_bits(run(native.mixed_cells, call), expected), count


@plans
def test_bits_do_not_depend_on_what_was_computed_before(plan: CellPlan) -> None:
    """Workspaces are used again; one full of NaN must leave no trace."""
    module = build.load().module
    assert module is not None
    call = draw_call(plan, 3, edges=True)
    expected = run(native.mixed_cells, call)
    for other in PLANS.values():
        for size in ((3, 2), (11, 13)):
            poison = draw_call(other, 5, size, edges=True)
            for value in vars(poison).values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.fill_(NAN)
            run(native.mixed_cells, poison)
            assert same_bits(run(native.mixed_cells, call), expected)
    module.release_workspace()
    assert module.workspace_bytes() == 0
    assert same_bits(run(native.mixed_cells, call), expected)


# ---- NaN and infinity ----

ANYWHERE = [
    *((where, value) for where in ("before", "previous") for value in (NAN, INFINITY, -INFINITY)),
    *((f"preprocess{i}", value) for i in (0, 1) for value in (NAN, INFINITY, -INFINITY)),
    *(("reduce", value) for value in (NAN, INFINITY, -INFINITY)),
    *((where, NAN) for where in ("pointwise", "operations", "edges", "gradient")),
]
# In evaluation, kernels multiply these by the zeros around an image, where eager leaves them out.
IN_TRAINING = [
    *((where, value) for where in ("depthwise3", "depthwise5") for value in (NAN, INFINITY)),
    *(("pointwise", value) for value in (INFINITY, -INFINITY)),
]


def spoil(call: Call, where: str, value: float, draw: random.Random) -> bool:
    """Put ``value`` at one place of a tensor or a weight of ``call``.

    False if there is no such tensor, or an edge was drawn that computes nothing: eager leaves its
    mixing weights out of its graph, where the native twin multiplies them by zero gradients.
    """
    target = call.plan.weights.unpack(call.weights).get(where, getattr(call, where, None))
    if target is None:
        return False
    place = tuple(draw.randrange(size) for size in target.shape)
    mixing = where in ("operations", "edges")
    if mixing and call.active is not None and not call.active[place[0], 1:].any():
        return False
    target[place] = value
    return True


def assert_spread_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same numbers are finite, and these are equal."""
    for name, expected in theirs.items():
        actual = ours.get(name, torch.zeros_like(expected))
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite), name
        torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-8, atol=1e-8)


def draw_spoilt(draw: random.Random, training: bool) -> Call:
    partial = draw.choice((1, 1, 2, 4))
    channels = partial * draw.choice((2, 3, 4, 6, 8, 10, 16, 20))
    plan = CellPlan(
        draw.choice((1, 3, 18)),
        draw.choice((2, 5, 17)),
        channels,
        partial,
        reduction=draw.random() < 0.5,
        previous_reduction=draw.random() < 0.5,
    )
    return draw_call(
        plan,
        draw.randint(2, 5),
        (draw.randint(2, 7), draw.randint(2, 7)),
        missing=(draw.randint(0, 1), draw.randint(0, 1)),
        training=training,
        edges=partial > 1 and draw.random() < 0.5,
        choice=draw.choice(("all", *CHOICES)),
        seed=draw.randrange(2**16),
    )


def compare_spoilt(where: str, value: float, training: bool) -> None:
    draw = random.Random(f"{where} {value} {training}")
    compared = spread = 0
    while compared < 8:
        call = draw_spoilt(draw, training)
        if not spoil(call, where, value, draw):
            continue
        theirs = run(mixed.mixed_cells, call)
        assert_spread_alike(run(native.mixed_cells, call), theirs)
        compared += 1
        spread += any(not result.isfinite().all() for result in theirs.values())
    assert spread or value == -INFINITY  # which the ReLU takes away


@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("where", ["before", "previous", "gradient", "operations", "edges"])
def test_nan_spreads_as_in_eager_where_registers_are_shuffled(where: str, channels: int) -> None:
    """Single precision has a shuffle of its own (csrc/cpu/shuffle.h)."""
    draw = random.Random(f"{where} {channels}")
    for reduction in (False, True):
        plan = CellPlan(5, 6, channels, 4, reduction=reduction, previous_reduction=False)
        call = draw_call(plan, 3, (5, 6), edges=True).to(torch.float32)
        assert spoil(call, where, NAN, draw)
        theirs = run(mixed.mixed_cells, call)
        assert any(not result.isfinite().all() for result in theirs.values())
        for name, value in run(native.mixed_cells, call).items():
            assert torch.equal(value.isfinite(), theirs[name].isfinite()), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("where", "value"), ANYWHERE)
def test_what_is_not_finite_spreads_as_in_eager(where: str, value: float, training: bool) -> None:
    compare_spoilt(where, value, training)


@pytest.mark.parametrize(("where", "value"), IN_TRAINING)
def test_what_is_not_finite_spreads_as_in_eager_in_training(where: str, value: float) -> None:
    compare_spoilt(where, value, training=True)


@plans
def test_nan_in_the_mixing_weights_spreads(plan: CellPlan) -> None:
    call = draw_call(plan, 3)
    call.operations[3, 4] = NAN  # an edge into node 3
    ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
    assert torch.equal(ours["output"].isnan(), theirs["output"].isnan())
    assert ours["output"].isnan().any()
    assert not ours["output"][:, : plan.channels].isnan().any()  # node 2


# ---- arguments ----

Change = Callable[[Any], Any]


def cut(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def column_less(x: Tensor) -> Tensor:
    return x[..., :-2].contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """The same numbers with a gap between any two."""
    return torch.stack([x, x], -1)[..., 0]


def half(x: Tensor) -> Tensor:
    return x.half()


def whole(x: Tensor) -> Tensor:
    return x.int()


def single(x: Tensor) -> Tensor:
    return x.float()


def rows_first(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format)


def one_image_less(x: Tensor) -> Tensor:
    return x[1:]


def no_image(x: Tensor) -> Tensor:
    return x[:0]


def wrong_active(shape: tuple[int, ...], dtype: torch.dtype) -> Change:
    return lambda _: torch.ones(shape, dtype=dtype)


BOTH = [
    ("weights", cut, r"weights must be \[\d+\], not \[\d+\]"),
    ("weights", half, "weights must be float32 or float64, not Half"),
    ("weights", whole, "weights must be float32 or float64, not Int"),
    ("weights", strided, r"weights must be contiguous; it has strides \[2\]"),
    ("before", single, "before must be Double as `previous` is, not Float"),
    ("before", rows_first, "before must be contiguous in channels-last format; it has strides"),
    ("before", one_image_less, "before has 1 images, previous 2"),
    ("before", column_less, r"before of \d+ x \d+ does not fit previous of \d+ x \d+"),
    ("previous", no_image, "previous is empty"),
    ("previous", lambda x: x[0], r"previous must be \[images, channels, height, width\]"),
    ("previous", rows_first, "previous must be contiguous in channels-last format"),
    ("operations", cut, r"operations must be \[1, 14, 8\], not \[1, 14, 7\]"),
    ("operations", single, "operations must be Double as `weights` is, not Float"),
    ("bypass", cut, r"bypass must be \[1, 14\], not \[1, 13\]"),
    ("bypass", strided, "bypass must be contiguous"),
    ("channels", lambda _: [0], "channels must be a positive multiple of partial, not 0 and 2"),
    ("partial", lambda _: 3, "channels must be a positive multiple of partial, not 8 and 3"),
    ("reduction", lambda _: [True, True], "must be of one length, that of the chain, not 1 and 2"),
    ("channels", lambda _: [], "must be of one length, that of the chain, not 0 and 1"),
    ("active", wrong_active((1, 14, 8), torch.int32), "active must be contiguous boole.*not Int"),
    ("active", wrong_active((14, 8), torch.bool), r"active must be .*\[1, 14, 8\].*\[14, 8\]"),
]
FORWARD = [
    ("running_mean", cut, r"running_mean must be \[\d+\], not \[\d+\]"),
    ("running_mean", single, "running_mean must be Double"),
    ("running_variance", strided, "running_variance must be contiguous"),
]
BACKWARD = [
    ("gradient", rows_first, "gradient must be contiguous in channels-last format"),
    ("gradient", single, "gradient must be Double"),
    ("gradient", lambda x: x[:1], r"gradient must be \[2, 32, 3, 3\], not \[1, 32, 3, 3\]"),
    ("kept", cut, r"kept must be \[\d+\], not \[\d+\]"),
    ("mean", cut, r"mean must be \[\d+\], not \[\d+\]"),
    ("reciprocal_deviation", single, "reciprocal_deviation must be Double"),
]


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize(("name", "change", "message"), BOTH)
def test_wrong_arguments_are_named(direction: int, name: str, change: Change, message: str) -> None:
    refuse(direction, name, change, message)


@pytest.mark.parametrize(("name", "change", "message"), FORWARD)
def test_wrong_statistics_are_named(name: str, change: Change, message: str) -> None:
    refuse(0, name, change, message)


@pytest.mark.parametrize(("name", "change", "message"), BACKWARD)
def test_wrong_arguments_of_the_backward_pass_are_named(
    name: str, change: Change, message: str
) -> None:
    refuse(1, name, change, message)


def refuse(direction: int, name: str, change: Change, message: str) -> None:
    operator, arguments = recorded(draw_call(PARTIAL, edges=True))[direction]
    operator(**arguments)  # right as it is
    with pytest.raises(RuntimeError, match=message):
        operator(**(arguments | {name: change(arguments[name])}))


@pytest.mark.parametrize("name", ["previous", "operations", "running_mean"])
def test_other_devices_are_refused(name: str) -> None:
    """Called past the dispatcher, which already tells them apart."""
    operator, arguments = recorded(draw_call(PARTIAL, edges=True))[0]
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on cpu as `weights` is, not on meta"):
        operator.redispatch(cpu, **arguments)


@pytest.mark.parametrize("plan", [FULL, REDUCING], ids=["full", "reducing"])
def test_one_value_per_channel_has_no_variance(plan: CellPlan) -> None:
    size = (2, 2) if plan.reduction else (1, 1)
    with pytest.raises(
        RuntimeError, match=r"more than one value per channel: got 1 image .* 1 x 1"
    ):
        run(native.mixed_cells, draw_call(plan, 1, size))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(mixed.mixed_cells, draw_call(plan, 1, size))
    run(native.mixed_cells, draw_call(plan, 1, size, training=False))


def test_layout_of_the_inputs_does_not_matter() -> None:
    """The cell wants channels last, and brings them there itself."""
    call = draw_call(FULL, 3)
    expected = run(native.mixed_cells, call)
    for layout in (torch.channels_last, torch.contiguous_format):
        for name in ("before", "previous", "gradient"):
            x = getattr(call, name)
            object.__setattr__(call, name, x.contiguous(memory_format=layout))
        ours = run(native.mixed_cells, call)
        assert same_bits(ours, expected)
        assert ours["output"].is_contiguous(memory_format=torch.channels_last)

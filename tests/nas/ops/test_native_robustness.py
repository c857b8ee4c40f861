"""The native cell: the same bits always, NaN and infinity as in eager, and arguments refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_cells import draw_call, recorded, run, same_bits
from torch import Tensor

from nas.ops import build, mixed, native
from nas.ops.mixed import CellPlan

pytestmark = pytest.mark.usefixtures("native")

FULL = CellPlan(3, 6, 8, 1, reduction=False, previous_reduction=False)
REDUCING = CellPlan(6, 3, 16, 1, reduction=True, previous_reduction=False)
PARTIAL = CellPlan(5, 6, 8, 2, reduction=True, previous_reduction=True)
PLANS = {"full": FULL, "reducing": REDUCING, "partial": PARTIAL}
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
    expected = run(native.mixed_cell, call)
    for count in (2, 3, 1):
        torch.set_num_threads(count)
        for _ in range(2):
            assert same_bits(run(native.mixed_cell, call), expected), count


@plans
def test_bits_do_not_depend_on_what_was_computed_before(plan: CellPlan) -> None:
    """Workspaces are used again; one full of NaN must leave no trace."""
    module = build.load().module
    assert module is not None
    call = draw_call(plan, 3, edges=True)
    expected = run(native.mixed_cell, call)
    for other in PLANS.values():
        for size in ((3, 2), (11, 13)):
            poison = draw_call(other, 5, size, edges=True)
            for value in vars(poison).values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.fill_(NAN)
            run(native.mixed_cell, poison)
            assert same_bits(run(native.mixed_cell, call), expected)
    module.release_workspace()
    assert module.workspace_bytes() == 0
    assert same_bits(run(native.mixed_cell, call), expected)


# ---- NaN and infinity ----


def with_one_pixel(
    plan: CellPlan, training: bool, where: str, value: float
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Results of both twins for calls in which one pixel of the middle image is ``value``."""
    for choice in ("all", "some", "one-each"):
        for seed in range(2):
            call = draw_call(plan, 3, (9, 8), training=training, choice=choice, seed=seed)
            getattr(call, where)[1, 1, 4, 2] = value
            yield run(native.mixed_cell, call), run(mixed.mixed_cell, call)


spoilt = pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
sides = pytest.mark.parametrize("where", ["before", "previous"])
modes = pytest.mark.parametrize("training", [True, False])


@spoilt
@sides
@modes
def test_what_is_not_finite_spreads_as_in_eager(value: float, where: str, training: bool) -> None:
    """From one pixel: over its neighbourhood in evaluation, over its channels in training."""
    for ours, theirs in with_one_pixel(FULL, training, where, value):
        torch.testing.assert_close(
            ours["output"], theirs["output"], rtol=1e-9, atol=1e-9, equal_nan=True
        )


@plans
@spoilt
@sides
@modes
def test_what_is_not_finite_is_never_lost(
    plan: CellPlan, value: float, where: str, training: bool
) -> None:
    """Where channels are halved, kernels multiply by zeros that eager leaves out, so that more
    channels than in eager see the NaN; never fewer, and never another image's."""
    for ours, theirs in with_one_pixel(plan, training, where, value):
        for name, expected in theirs.items():
            assert not (ours[name].isfinite() & ~expected.isfinite()).any(), name
        if not training:
            others = (x["output"][[0, 2]] for x in (ours, theirs))
            torch.testing.assert_close(*others, rtol=1e-9, atol=1e-9)


@plans
def test_nan_in_the_mixing_weights_spreads(plan: CellPlan) -> None:
    call = draw_call(plan, 3)
    call.operations[3, 4] = NAN  # an edge into node 3
    ours, theirs = run(native.mixed_cell, call), run(mixed.mixed_cell, call)
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
    ("before", single, "before must be Double as `weights` is, not Float"),
    ("before", rows_first, "before must be contiguous in channels-last format; it has strides"),
    ("before", one_image_less, "before has 1 images, previous 2"),
    ("before", column_less, r"before of \d+ x \d+ does not fit previous of \d+ x \d+"),
    ("previous", no_image, "previous is empty"),
    ("previous", lambda x: x[0], r"previous must be \[images, channels, height, width\]"),
    ("previous", rows_first, "previous must be contiguous in channels-last format"),
    ("operations", cut, r"operations must be \[14, 8\], not \[14, 7\]"),
    ("operations", single, "operations must be Double as `weights` is, not Float"),
    ("bypass", cut, r"bypass must be \[14\], not \[13\]"),
    ("bypass", strided, "bypass must be contiguous"),
    ("channels", lambda _: 0, "channels must be a positive multiple of partial, not 0 and 2"),
    ("partial", lambda _: 3, "channels must be a positive multiple of partial, not 8 and 3"),
    ("active", wrong_active((14, 8), torch.int32), "active must be contiguous booleans.*not Int"),
    ("active", wrong_active((8, 14), torch.bool), r"active must be .*\[14, 8\].*\[8, 14\]"),
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
    ("states", cut, r"states must be \[2, 2, 5, 6, 8\], not"),
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
        run(native.mixed_cell, draw_call(plan, 1, size))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(mixed.mixed_cell, draw_call(plan, 1, size))
    run(native.mixed_cell, draw_call(plan, 1, size, training=False))


def test_layout_of_the_inputs_does_not_matter() -> None:
    """The cell wants channels last, and brings them there itself."""
    call = draw_call(FULL, 3)
    expected = run(native.mixed_cell, call)
    for layout in (torch.channels_last, torch.contiguous_format):
        for name in ("before", "previous", "gradient"):
            x = getattr(call, name)
            object.__setattr__(call, name, x.contiguous(memory_format=layout))
        ours = run(native.mixed_cell, call)
        assert same_bits(ours, expected)
        assert ours["output"].is_contiguous(memory_format=torch.channels_last)

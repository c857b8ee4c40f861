"""The native cell against its eager twin: outputs, statistics, gradients, for any shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from native_cells import CHOICES, INPUTS, Call, assert_close, calls, draw_call, run

from nas.ops import build, mixed, native
from nas.ops.mixed import CellPlan

pytestmark = pytest.mark.usefixtures("native")

TESTS = Path(__file__).parents[2]
FULL = CellPlan(6, 5, 8, 1, reduction=False, previous_reduction=False)
PARTIAL = CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=True)
# Shuffled in registers (csrc/cpu/shuffle.h).
QUARTERS = {
    f"quarter-{channels}": CellPlan(16, 5, channels, 4, reduction, previous_reduction=False)
    for channels, reduction in ((16, False), (32, True), (64, False))
}
PLANS = {"full": FULL, "partial": PARTIAL, **QUARTERS}
INSTRUCTIONS = """
import torch
from native_cells import CHOICES, assert_close, draw_call, run
from nas.ops import backend, build, mixed, native
from nas.ops.mixed import CellPlan
backend.choose("native")
print(build.load().module.build_info()["instruction_set"])
for channels in (2, 4, 6, 8, 16, 20):
    for partial, reduction in ((1, False), (2, True)):
        plan = CellPlan(3, 9, channels * partial, partial, reduction, reduction)
        for training in (True, False):
            call = draw_call(plan, 3, (7, 6), training=training, edges=partial > 1)
            assert_close(run(native.mixed_cells, call), run(mixed.mixed_cells, call))
for channels in (16, 32, 64):
    for reduction in (True, False):
        plan = CellPlan(3, 9, channels, 4, reduction, reduction)
        call = draw_call(plan, 3, (7, 6), edges=True)
        exact = run(mixed.mixed_cells, call)
        assert_close(run(native.mixed_cells, call), exact)
        for name, single in run(native.mixed_cells, call.to(torch.float32)).items():
            assert (single - exact[name]).norm() <= 1e-4 * exact[name].norm(), name
"""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_equals_eager_for_any_shape(call: Call) -> None:
    assert_close(run(native.mixed_cells, call), run(mixed.mixed_cells, call))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("training", [True, False])
def test_equals_eager(plan: CellPlan, choice: str, training: bool) -> None:
    """Every choice of operations at least once, whatever shapes are drawn."""
    call = draw_call(plan, 3, training=training, edges=plan.partial > 1, choice=choice)
    ours = run(native.mixed_cells, call)
    assert_close(ours, run(mixed.mixed_cells, call))
    if call.active is not None:
        assert not ours["operations"][~call.active].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("plan", [FULL, PARTIAL], ids=["full", "partial"])
def test_smallest_images(plan: CellPlan, size: tuple[int, int]) -> None:
    for images, training in ((1, False), (5, True)):
        call = draw_call(plan, images, size, missing=(1, 1), training=training, edges=True)
        assert_close(run(native.mixed_cells, call), run(mixed.mixed_cells, call))


def test_statistics_are_left_alone_when_asked() -> None:
    call = draw_call(FULL)
    quiet = run(native.mixed_cells, call, update=False)
    assert torch.equal(quiet["running mean"], call.mean)
    assert torch.equal(quiet["running variance"], call.variance)
    assert torch.equal(quiet["output"], run(native.mixed_cells, call)["output"])


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_of_zero_has_a_gradient_where_its_operation_is_active(training: bool) -> None:
    call = draw_call(FULL, training=training)
    call.operations[::2] = 0
    ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
    assert theirs["operations"][::2, 1:].abs().min() > 0
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-10)


def test_means_far_from_zero_do_not_cancel() -> None:
    """Variances from sums of squares would have lost every digit."""
    call = draw_call(FULL)
    call.previous.add_(1e4)
    ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
    torch.testing.assert_close(
        ours["running variance"], theirs["running variance"], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("training", [True, False])
def test_single_precision_is_as_good_as_that_of_eager(plan: CellPlan, training: bool) -> None:
    """Both against eager in double precision, by the median over draws."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for seed in range(7):
        call = draw_call(plan, 4, (9, 8), training=training, edges=plan.partial > 1, seed=seed)
        call = call.to(torch.float32).to(torch.float64)  # the same numbers in both precisions
        exact = run(mixed.mixed_cells, call)
        single = call.to(torch.float32)
        for twin, collected in ((native.mixed_cells, ours), (mixed.mixed_cells, theirs)):
            for name, value in run(twin, single).items():
                assert value.dtype == torch.float32
                distance = (value.double() - exact[name]).norm() / exact[name].norm()
                collected.setdefault(name, []).append(distance.item())
    assert {"output", *INPUTS} <= ours.keys() | {"edges"}
    for name, distances in ours.items():
        assert median(distances) <= 2 * median(theirs[name]) + 1e-8, name


# ---- instruction sets ----


def with_instructions(name: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", INSTRUCTIONS],
        env={**os.environ, "PYTHONPATH": path, "NAS_TRANSFER_INSTRUCTIONS": name},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_instruction_set_of_this_processor_equals_eager() -> None:
    """The kernels are chosen once a process, so each set has a process of its own."""
    module = build.load().module
    assert module is not None
    names = module.build_info()["instruction_sets"]
    assert "portable" in names
    for name in names:
        done = with_instructions(name)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert done.stdout.split() == [name]


def test_unknown_instruction_set_is_named() -> None:
    done = with_instructions("avx3")
    assert done.returncode != 0
    assert "NAS_TRANSFER_INSTRUCTIONS is 'avx3', but this processor and this" in done.stderr
    assert "portable" in done.stderr

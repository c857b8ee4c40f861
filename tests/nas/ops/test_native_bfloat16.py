"""Cells that keep images in bfloat16: the native twin against the eager one, and both against the
same numbers in double precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from native_cells import CHOICES, INPUTS, Call, draw_call, errors, recorded, run, same_bits
from torch import Tensor

from nas.data import TaskShape
from nas.errors import ConfigurationError
from nas.ops import build, mixed, native
from nas.ops.mixed import EDGES, OPERATIONS, SKIP, CellPlan
from nas.search import METHODS
from nas.spaces.darts.supernet import Supernet, SupernetConfig

pytestmark = pytest.mark.usefixtures("native")

TESTS = Path(__file__).parents[2]
IMAGES = ("before", "previous", "gradient")
PLANS = {
    "full": CellPlan(6, 5, 8, 1, reduction=False, previous_reduction=False),
    "wide": CellPlan(33, 16, 20, 1, reduction=True, previous_reduction=False),
    "partial": CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=True),
    "quarter": CellPlan(16, 40, 64, 4, reduction=False, previous_reduction=True),
    "few": CellPlan(3, 8, 16, 4, reduction=False, previous_reduction=False),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
trainings = pytest.mark.parametrize("training", [True, False])
INSTRUCTIONS = """
from test_native_bfloat16 import PLANS, assert_alike
from nas.ops import backend, build
backend.choose("native")
print(build.load().module.build_info()["instruction_set"])
for plan in PLANS.values():
    for training in (True, False):
        assert_alike(plan, training)
"""


def halved(call: Call) -> Call:
    """The same call in single precision with its images in bfloat16."""
    images = {name: getattr(call, name).bfloat16() for name in IMAGES}
    return replace(call.to(torch.float32), **images)


def draw_half(plan: CellPlan, images: int = 4, size: tuple[int, int] = (9, 8), **how: object) -> Call:
    return halved(draw_call(plan, images, size, edges=plan.partial > 1, **how))  # type: ignore[arg-type]


def assert_alike(plan: CellPlan, training: bool, choice: str = "all") -> None:
    """Rounded in the same places, the twins' outputs are the same numbers but for those that fell
    between two; gradients are rounded in other places, and differ by that."""
    call = draw_half(plan, training=training, choice=choice)
    ours, theirs = run(native.mixed_cell, call), run(mixed.mixed_cell, call)
    for name, value in theirs.items():
        image = name in ("output", *IMAGES)
        assert value.dtype == (torch.bfloat16 if image else torch.float32), name
        if name in ours:
            assert ours[name].dtype == value.dtype, name
    assert (ours["output"] == theirs["output"]).double().mean() > 0.97
    norms = distances(ours, theirs)
    assert norms.pop("output") < 1e-3
    assert norms.pop("running mean") < 1e-4
    assert norms.pop("running variance") < 1e-4
    assert max(norms.values()) < 0.02, norms


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the differences, relative to theirs."""
    found = {}
    for name, value in theirs.items():
        mine = ours.get(name, torch.zeros_like(value)).double()
        found[name] = ((mine - value.double()).norm() / value.double().norm().clamp_min(1e-2)).item()
    return found


@plans
@pytest.mark.parametrize("choice", CHOICES)
@trainings
def test_equals_the_eager_twin(plan: CellPlan, choice: str, training: bool) -> None:
    assert_alike(plan, training, choice)


@plans
@trainings
def test_is_as_near_to_double_precision_as_the_eager_twin(plan: CellPlan, training: bool) -> None:
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for seed in range(5):
        call = draw_half(plan, training=training, seed=seed)
        exact = run(mixed.mixed_cell, call.to(torch.float64))
        for twin, collected in ((native.mixed_cell, ours), (mixed.mixed_cell, theirs)):
            for name, distance in distances(run(twin, call), exact).items():
                collected.setdefault(name, []).append(distance)
    assert {"output", *INPUTS} <= ours.keys() | {"edges"}
    for name, found in ours.items():
        assert median(found) <= 1.5 * median(theirs[name]) + 1e-6, name
        assert median(found) < 0.05, name

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
from nas.ops.mixed import SKIP, CellPlan
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


def draw_half(
    plan: CellPlan, images: int = 4, size: tuple[int, int] = (9, 8), **how: object
) -> Call:
    return halved(draw_call(plan, images, size, edges=plan.partial > 1, **how))  # type: ignore[arg-type]


def assert_alike(plan: CellPlan, training: bool, choice: str = "all") -> None:
    """Rounded in the same places, the twins' outputs are the same numbers but for those that fell
    between two; gradients are rounded in other places, and differ by that."""
    call = draw_half(plan, training=training, choice=choice)
    ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
    for name, value in theirs.items():
        image = name in ("output", *IMAGES)
        assert value.dtype == (torch.bfloat16 if image else torch.float32), name
        if name in ours:
            assert ours[name].dtype == value.dtype, name
    # in training, a number that fell the other way changes all others a little, by the statistics
    assert (ours["output"] == theirs["output"]).double().mean() > (0.8 if training else 0.99)
    norms = distances(ours, theirs)
    assert norms.pop("output") < 3e-3
    assert norms.pop("running mean") < 1e-3
    assert norms.pop("running variance") < 1e-3
    assert max(norms.values(), default=0) < 0.03, norms


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the differences, relative to theirs."""
    found = {}
    for name, value in theirs.items():
        mine = ours.get(name, torch.zeros_like(value)).double()
        found[name] = (
            (mine - value.double()).norm() / value.double().norm().clamp_min(1e-2)
        ).item()
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
        exact = run(mixed.mixed_cells, call.to(torch.float64))
        for twin, collected in ((native.mixed_cells, ours), (mixed.mixed_cells, theirs)):
            for name, distance in distances(run(twin, call), exact).items():
                collected.setdefault(name, []).append(distance)
    assert {"output", *INPUTS} <= ours.keys() | {"edges"}
    for name, found in ours.items():
        assert median(found) <= 1.5 * median(theirs[name]) + 1e-6, name
        assert median(found) < 0.2, name


def test_rounds_to_the_nearest_and_of_two_equally_near_ones_to_the_even() -> None:
    """A cell that does nothing but multiply: its first node is the first input times a weight."""
    plan = CellPlan(2, 2, 2, 1, reduction=False, previous_reduction=False)
    numbers = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = numbers[~((numbers < 0) | (numbers.abs() < 1e-30))]  # the ReLU would take these
    numbers = numbers[: numbers.numel() // 8 * 8].view(1, 2, 4, -1)
    call = draw_call(plan, 1, tuple(numbers.shape[2:]), training=False, choice="nothing")
    assert call.active is not None
    call.active[0, SKIP] = True
    call.operations[0, SKIP] = 1 + 2**-8  # makes a tie of every second number
    call.mean.zero_()
    call.variance.fill_(1 - 1e-5)
    call.weights.zero_()
    plan.weights.unpack(call.weights)["preprocess0"].copy_(torch.eye(2))
    call = replace(halved(call), before=numbers, previous=numbers.clone().fill_(1))
    # only the weight 1 keeps NaN and infinity out of the other channel, which multiplies them by 0
    for channel in range(2):
        one = numbers.clone()
        one[:, 1 - channel] = 1
        output = run(native.mixed_cells, replace(call, before=one), needed=())["output"]
        expected = (one.float() * (1 + 2**-8)).bfloat16()[:, channel]
        assert torch.equal(output[:, channel].isnan(), expected.isnan())
        assert torch.equal(output[:, channel].nan_to_num(), expected.nan_to_num())


@plans
def test_bits_do_not_depend_on_the_number_of_threads(plan: CellPlan, threads: None) -> None:
    call = draw_half(plan, 19, (5, 6))
    torch.set_num_threads(1)
    expected = run(native.mixed_cells, call)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(run(native.mixed_cells, call), expected), count


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
@plans
def test_smallest_images(plan: CellPlan, size: tuple[int, int]) -> None:
    for images, training in ((1, False), (5, True)):
        call = draw_half(plan, images, size, missing=(1, 1), training=training)
        ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
        assert ours["output"].isfinite().all()
        assert errors({"output": ours["output"]}, {"output": theirs["output"]})["output"] < 0.05


@plans
def test_nan_and_infinity_spread_as_in_the_eager_twin(plan: CellPlan) -> None:
    for name in IMAGES:
        for value in (float("nan"), float("inf")):
            call = draw_half(plan, training=True)
            getattr(call, name)[1, 0, 2, 1] = value
            ours, theirs = run(native.mixed_cells, call), run(mixed.mixed_cells, call)
            for result, expected in theirs.items():
                assert torch.equal(ours[result].isfinite(), expected.isfinite()), (name, result)


# ---- a good citizen of PyTorch ----


@pytest.mark.parametrize("plan", [PLANS["full"], PLANS["partial"]], ids=["full", "partial"])
@trainings
def test_operators_are_registered_as_pytorch_wants(plan: CellPlan, training: bool) -> None:
    call = draw_half(plan, 2, (4, 3), training=training)
    for needed in (INPUTS, ("operations",)):
        (forward, arguments), (backward, others) = recorded(call, needed)
        assert arguments["previous"].dtype == others["kept"].dtype == torch.bfloat16
        for name in set(needed) & arguments.keys():
            arguments[name].requires_grad_()
        torch.library.opcheck(forward, (), arguments)
        torch.library.opcheck(backward, (), others)


REFUSED = [
    (0, "previous", torch.float16, "previous must be Float as `weights` is, not Half"),
    (0, "before", torch.float32, "before must be BFloat16 as `previous` is, not Float"),
    (0, "weights", torch.float64, "previous must be Double as `weights` is, not BFloat16"),
    (0, "weights", torch.bfloat16, "weights must be float32 or float64, not BFloat16"),
    (0, "operations", torch.bfloat16, "operations must be Float as `weights` is, not BFloat16"),
    (1, "gradient", torch.float32, "gradient must be BFloat16 as `previous` is, not Float"),
    (1, "kept", torch.float32, "kept must be BFloat16 as"),
]


@pytest.mark.parametrize(("direction", "name", "dtype", "message"), REFUSED)
def test_other_mixtures_of_types_are_named(
    direction: int, name: str, dtype: torch.dtype, message: str
) -> None:
    operator, arguments = recorded(draw_half(PLANS["partial"]))[direction]
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(RuntimeError, match=message):
        operator(**arguments)


def test_the_eager_twin_refuses_them_too() -> None:
    call = replace(draw_call(PLANS["full"]), previous=draw_half(PLANS["full"]).previous)
    with pytest.raises(ConfigurationError, match=r"bfloat16 beside weights that are .*float64"):
        run(mixed.mixed_cells, call)


@pytest.mark.parametrize("partial", [1, 2])
def test_compiles_without_a_graph_break(partial: int) -> None:
    config = SupernetConfig(channels=4, cells=3, partial=partial, edge_normalisation=partial > 1)
    method = METHODS["darts"]
    images = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(1))

    def make(backend: str) -> Supernet:
        shape = TaskShape(2, 6, 5, 3)
        return Supernet(shape, config, seed=0, backend=backend, storage="bfloat16")

    compiled, plain, eager = make("native"), make("native"), make("eager")
    scores = torch.compile(
        lambda images: compiled(images, method.mixing(compiled)),
        fullgraph=True,
        backend="aot_eager",
    )
    got, same = scores(images), plain(images, method.mixing(plain))
    expected = eager(images, method.mixing(eager))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, same)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)
    for value in (got, same, expected):
        value.square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


# ---- instruction sets ----


def test_every_instruction_set_of_this_processor_equals_the_eager_twin() -> None:
    module = build.load().module
    assert module is not None
    folders = [TESTS, TESTS.parent, Path(__file__).parent]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    for name in module.build_info()["instruction_sets"]:
        done = subprocess.run(
            [sys.executable, "-c", INSTRUCTIONS],
            env={**os.environ, "PYTHONPATH": path, "NAS_TRANSFER_INSTRUCTIONS": name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert done.stdout.split() == [name]

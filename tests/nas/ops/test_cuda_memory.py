"""What the emulated CUDA kernels (tests/cuda_emulation) keep between the passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple

import emulated_cells
import native_chains
import pytest
import torch
from native_cells import draw_call, run, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nas.data import TaskShape
from nas.errors import NativeError
from nas.ops import mixed, native
from nas.ops.backend import MixedCells
from nas.ops.mixed import EDGES, OPERATIONS, CellPlan, Statistics
from nas.spaces.darts.supernet import Supernet, SupernetConfig

PAPERS = {"DARTS": 1, "PC-DARTS": 4}  # of how many channels one is mixed; 16 at first, 8 cells
PIXELS = 32  # a side
SIZE = 16  # what is counted with instead: shares are the same


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    try:
        emulated_cells.load()
    except NativeError as error:
        pytest.skip(f"cannot compile the emulation: {error}")


def plans_of(method: str) -> list[CellPlan]:
    config = SupernetConfig(channels=16, cells=8, partial=PAPERS[method])
    return Supernet(TaskShape(3, SIZE, SIZE, 10), config, seed=0, backend="eager").plans


def kept_bytes(twin: MixedCells, plans: Sequence[CellPlan], size: int, *, inputs: bool) -> int:
    """What the way back needs of a forward pass of some images, each piece of memory once, with the
    output and, if asked for, the inputs that it needs. Without the parameters, which are there."""
    leaves = {
        name: x.float() for name, x in native_chains.draw_inputs(plans, size=(size, size)).items()
    }
    for name in ("before", "previous"):
        leaves[name] = leaves[name].contiguous(memory_format=torch.channels_last)
    for x in leaves.values():
        x.requires_grad_()
    count = sum(plan.statistics.size for plan in plans)
    pieces: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        pieces[x.untyped_storage().data_ptr()] = x  # which keeps its address taken
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        statistics = Statistics(torch.zeros(count), torch.ones(count), training=True)
        images = (leaves["before"], leaves["previous"])
        mixing = (leaves["operations"], leaves["edges"])
        pack(twin(plans, *images, leaves["weights"], statistics, *mixing))
    for x in (leaves["weights"], *mixing, *(() if inputs else images)):
        pieces.pop(x.untyped_storage().data_ptr(), None)
    return sum(x.untyped_storage().nbytes() for x in pieces.values())


def share(plans: Sequence[CellPlan], size: int, *, inputs: bool) -> float:
    """What the kernels keep of what eager does."""
    ours, theirs = (
        kept_bytes(twin, plans, size, inputs=inputs)
        for twin in (emulated_cells.mixed_cells, mixed.mixed_cells)
    )
    return ours / theirs


def with_sizes(plans: Sequence[CellPlan]) -> Iterator[tuple[CellPlan, int]]:
    """And the size of each one's images."""
    size = SIZE
    for plan in plans:
        yield plan, size
        size //= 1 + plan.reduction


# The percentages of docs/kernels.md.
@pytest.mark.parametrize(("method", "percent"), [("DARTS", 17), ("PC-DARTS", 17)])
def test_cuda_keeps_less_than_a_quarter_of_what_eager_does(method: str, percent: int) -> None:
    assert round(100 * share(plans_of(method), SIZE, inputs=True)) == percent


@pytest.mark.parametrize(
    ("method", "normal", "reducing"), [("DARTS", 24, 26), ("PC-DARTS", 25, 27)]
)
def test_cuda_each_cell_adds_less_than_a_quarter_of_what_it_does_in_eager(
    method: str, normal: int, reducing: int
) -> None:
    """And with its inputs, which other cells keep, reducing ones little more."""
    most = {False: 0, True: 0}
    for plan, size in with_sizes(plans_of(method)):
        assert share([plan], size, inputs=False) < 0.25, plan
        percent = round(100 * share([plan], size, inputs=True))
        most[plan.reduction] = max(most[plan.reduction], percent)
    assert most == {False: normal, True: reducing}


@pytest.mark.parametrize(
    ("method", "images", "percent"), [("DARTS", 64, 23), ("PC-DARTS", 256, 22)]
)
def test_cuda_with_the_workspace_it_is_less_than_a_quarter_too(
    method: str, images: int, percent: int
) -> None:
    """At the papers' batches: of the cell that needs most, in the backward pass."""
    plans = plans_of(method)
    scale = images * (PIXELS // SIZE) ** 2 / 3  # three images were counted
    ours, theirs = (
        scale * kept_bytes(twin, plans, SIZE, inputs=True)
        for twin in (emulated_cells.mixed_cells, mixed.mixed_cells)
    )
    workspace = max(
        torch.ops.nas_transfer_emulated.workspaces(images, PIXELS // SIZE * size, *astuple(plan))[1]
        for plan, size in with_sizes(plans)
    )
    assert round(100 * (ours + workspace) / theirs) == percent


CELLS = [
    CellPlan(16, 8, 16, 4, reduction=False, previous_reduction=False),
    CellPlan(8, 16, 32, 4, reduction=True, previous_reduction=True),
    CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=False),
    CellPlan(16, 16, 16, 1, reduction=False, previous_reduction=True),
    CellPlan(4, 4, 20, 1, reduction=True, previous_reduction=False),
]


@pytest.mark.parametrize("plan", CELLS, ids=str)
@pytest.mark.parametrize("choice", ["all", "some"])
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
def test_cuda_what_is_computed_again_has_the_same_bits(
    plan: CellPlan, choice: str, kind: str
) -> None:
    """As the same cell gives when it keeps its dilated convolutions, or computes them again where
    it would keep them."""
    call = draw_call(plan, 5, (9, 7), edges=plan.partial > 1, choice=choice)
    call = call.narrowed(torch.bfloat16) if kind == "bfloat16" else call.to(torch.float32)
    found = []
    for few in (16, 0, 32):
        with emulated_cells.few_up_to(few), emulated_cells.on_tensor_cores(kind == "tf32"):
            found.append(run(emulated_cells.mixed_cells, call))
    assert all(same_bits(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("plan", CELLS, ids=str)
def test_cuda_pytorch_is_told_how_much_is_kept(plan: CellPlan) -> None:
    """In advance, when nothing is on a GPU yet."""
    before = (12, 10) if plan.previous_reduction else (6, 5)
    shapes = [
        (3, plan.before_previous, *before),
        (3, plan.previous, 6, 5),
        (plan.weights.size,),
        *[(plan.statistics.size,)] * 2,
        (1, len(EDGES), len(OPERATIONS)),
        (1, len(EDGES)),
    ]
    cell = ([plan.channels], [plan.reduction], plan.partial, plan.previous_reduction, True, True)
    tensors = [torch.ones(shape) for shape in shapes]
    for x in tensors[:2]:
        x.data = x.contiguous(memory_format=torch.channels_last)
    kept = torch.ops.nas_transfer_emulated.mixed_cells(*tensors, None, *cell)[-1]
    with FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda") for shape in shapes]
        assert native._shapes(*tensors, None, *cell)[-1].shape == kept.shape

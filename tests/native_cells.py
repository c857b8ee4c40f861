"""Calls of the mixed cell with random tensors, made alike by its eager and its native twin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nas.ops import native
from nas.ops.backend import MixedCells
from nas.ops.mixed import EDGES, NODES, OPERATIONS, CellPlan, Statistics
from nas.randomness import generator

MIXING = ("operations", "edges")
INPUTS = ("before", "previous", "weights", *MIXING)
TOLERANCE = 1e-10  # relative to the largest entry of a tensor, in double precision
# Least scale of a comparison. The gradients that come in are of size 1: where all of a tensor is
# smaller than this, large numbers have cancelled (a normalisation forgets the scale of its input).
SMALLEST = 1e-2
# Less than a vector of 16 lanes, powers of two or not; exactly one; more than one; two.
MIXED_CHANNELS = [1, 2, 3, 4, 6, 8, 12, 16, 20, 32]
ALL, SOME, ONE, ONE_EACH, NOTHING = CHOICES = ("all", "some", "one", "one-each", "nothing")


@dataclass(frozen=True)
class Call:
    """The arguments of one call and the gradient that comes back to it."""

    plan: CellPlan
    before: Tensor
    previous: Tensor
    weights: Tensor
    mean: Tensor
    variance: Tensor
    operations: Tensor
    edges: Tensor | None
    active: Tensor | None
    training: bool
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> Call:
        """The same numbers in another precision."""
        tensors = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **tensors)

    def narrowed(self, dtype: torch.dtype) -> Call:
        """Images in ``dtype``, everything else in single precision."""
        images = ("before", "previous", "gradient")
        return replace(
            self.to(torch.float32), **{name: getattr(self, name).to(dtype) for name in images}
        )


def draw_call(
    plan: CellPlan,
    images: int = 2,
    size: tuple[int, int] = (5, 6),
    *,
    missing: tuple[int, int] = (0, 0),
    training: bool = True,
    edges: bool = False,
    choice: str = ALL,
    seed: int = 0,
) -> Call:
    """A random call in double precision.

    ``missing`` rows and columns make the tensor before the previous one odd where it is halved.
    ``choice``: which operations take part; what does not has weight zero and is not active, as
    :meth:`nas.spaces.darts.supernet.Mixing.live` has it.
    """
    draw = generator(seed, "test", "native")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    wide = [2 * x - less for x, less in zip(size, missing, strict=True)]
    nodes = [(x + 1) // 2 for x in size] if plan.reduction else size
    active = _choose(choice, draw)
    operations = 0.1 + uniform(len(EDGES), len(OPERATIONS))
    if active is not None:
        operations = (torch.ones_like(operations) if "one" in choice else operations) * active
    return Call(
        plan=plan,
        before=normal(images, plan.before_previous, *(wide if plan.previous_reduction else size)),
        previous=normal(images, plan.previous, *size),
        weights=0.5 * normal(plan.weights.size),
        mean=0.1 * normal(plan.statistics.size),
        variance=0.5 + uniform(plan.statistics.size),
        operations=operations,
        edges=0.1 + uniform(len(EDGES)) if edges else None,
        active=active,
        training=training,
        gradient=normal(images, NODES * plan.channels, *nodes),
    )


def _choose(choice: str, draw: torch.Generator) -> Tensor | None:
    shape = (len(EDGES), len(OPERATIONS))
    if choice == ALL:
        return None
    if choice == SOME:
        return torch.rand(shape, generator=draw) < 0.3
    active = torch.zeros(shape, dtype=torch.bool)
    if choice == ONE:
        active[
            torch.randint(shape[0], (), generator=draw), torch.randint(shape[1], (), generator=draw)
        ] = True
    if choice == ONE_EACH:
        active.scatter_(1, torch.randint(shape[1], (shape[0], 1), generator=draw), True)
    return active


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Calls of any shape."""

    def few(*values: int) -> int:
        return draw(st.sampled_from(values))

    partial, reduction, training = few(1, 2, 4), draw(st.booleans()), draw(st.booleans())
    plan = CellPlan(
        few(2, 3, 8, 33),
        few(2, 4, 16, 40),
        partial * few(*MIXED_CHANNELS),
        partial,
        reduction,
        previous_reduction=draw(st.booleans()),
    )
    images, height, width = (draw(st.integers(1, 9)) for _ in range(3))
    nodes = [(size + 1) // 2 if reduction else size for size in (height, width)]
    assume(not training or images * nodes[0] * nodes[1] > 1)
    return draw_call(
        plan,
        images,
        (height, width),
        missing=(few(0, 1), few(0, 1)),
        training=training,
        edges=draw(st.booleans()),
        choice=draw(st.sampled_from(CHOICES)),
        seed=draw(st.integers(0, 2**16)),
    )


def run(
    twin: MixedCells, call: Call, *, update: bool = True, needed: Iterable[str] = INPUTS
) -> dict[str, Tensor]:
    """What the call gives, the running statistics after it, and a gradient for each of ``needed``.

    A gradient is named like its input, and left out where there is none.
    """
    needed = [name for name in needed if getattr(call, name) is not None]
    leaves: dict[str, Tensor | None] = {
        name: value.detach().clone().requires_grad_(name in needed)
        if (value := getattr(call, name)) is not None
        else None
        for name in INPUTS
    }
    statistics = Statistics(call.mean.clone(), call.variance.clone(), call.training, update)
    alone = {
        name: None if value is None else value.unsqueeze(0)
        for name, value in (*((x, leaves[x]) for x in MIXING), ("active", call.active))
    }
    output = twin(
        [call.plan],
        leaves["before"],
        leaves["previous"],
        leaves["weights"],
        statistics,
        *alone.values(),
    )
    values = [leaves[name] for name in needed]
    gradients = (
        torch.autograd.grad(output, values, call.gradient, allow_unused=True)
        if output.requires_grad
        else [None] * len(values)
    )
    return {
        "output": output.detach(),
        "running mean": statistics.mean,
        "running variance": statistics.variance,
        **{n: g for n, g in zip(needed, gradients, strict=True) if g is not None},
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``theirs``; NaN if there is any."""
    scale = max(theirs.abs().max().item(), SMALLEST)
    return (ours - theirs).abs().max().item() / scale


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The error of each result; a gradient that one of both leaves out counts as zeros."""
    zero = torch.zeros((), dtype=torch.float64)
    return {
        name: error(ours.get(name, zero), theirs.get(name, zero)) for name in {**ours, **theirs}
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    wrong = {name: e for name, e in errors(ours, theirs).items() if not e <= TOLERANCE}
    assert not wrong, f"relative errors above {TOLERANCE}: {wrong}"


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether both hold exactly the same numbers."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


class Recorder(TorchDispatchMode):
    """Notes each call of a native operator: the operator and its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "nas_transfer":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func, dict(zip(names, args, strict=True))))
        return func(*args, **(kwargs or {}))


def recorded(call: Call, needed: Iterable[str] = INPUTS) -> list[tuple[Any, dict[str, Any]]]:
    """The operator calls, forward and backward, behind a call of the native cell."""
    with Recorder() as recorder:
        run(native.mixed_cells, call, needed=needed)
    return [
        (operator, {name: _detached(value) for name, value in arguments.items()})
        for operator, arguments in recorder.calls
    ]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

"""Chains of cells with random tensors, made alike by eager and native twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nas.ops.backend import MixedCells
from nas.ops.mixed import EDGES, NODES, OPERATIONS, CellPlan, Statistics
from nas.randomness import generator

NAMES = ("before", "previous", "weights", "operations", "edges")
NORMAL, REDUCING = False, True


def chain(
    *kinds: bool, channels: int = 4, partial: int = 1, previous_reduction: bool = False
) -> list[CellPlan]:
    """Plans of cells that follow each other; a reduction doubles the channels."""
    plans: list[CellPlan] = []
    before, previous = 3, 6
    for reduction in kinds:
        channels *= 2 if reduction else 1
        plan = CellPlan(before, previous, channels, partial, reduction, previous_reduction)
        plans.append(plan)
        before, previous, previous_reduction = previous, NODES * channels, reduction
    return plans


CHAINS = {
    "one": chain(NORMAL),
    "two": chain(NORMAL, NORMAL),
    "reductions": chain(REDUCING, REDUCING, NORMAL),
    "network": chain(NORMAL, REDUCING, NORMAL, REDUCING, NORMAL, partial=2),
    "after-a-reduction": chain(NORMAL, REDUCING, channels=6, partial=3, previous_reduction=True),
}


def draw_inputs(plans: Sequence[CellPlan], *, size: tuple[int, int] = (7, 5)) -> dict[str, Tensor]:
    """Random inputs in double precision, by name."""
    draw = generator(0, "test", "chain")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    first, cells = plans[0], len(plans)
    wide = [2 * x - 1 for x in size] if first.previous_reduction else size
    return {
        "before": normal(3, first.before_previous, *wide),
        "previous": normal(3, first.previous, *size),
        "weights": 0.5 * normal(sum(plan.weights.size for plan in plans)),
        "operations": torch.rand(
            cells, len(EDGES), len(OPERATIONS), generator=draw, dtype=torch.float64
        ),
        "edges": 0.1 + torch.rand(cells, len(EDGES), generator=draw, dtype=torch.float64),
    }


def run(
    twin: MixedCells,
    plans: Sequence[CellPlan],
    inputs: dict[str, Tensor],
    *,
    training: bool = True,
    needed: Sequence[str] = NAMES,
    active: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, running statistics and the gradients of ``needed``, by name."""
    leaves = {name: x.clone().requires_grad_(name in needed) for name, x in inputs.items()}
    size = sum(plan.statistics.size for plan in plans)
    dtype, device = inputs["weights"].dtype, inputs["weights"].device
    statistics = Statistics(
        torch.linspace(-0.1, 0.1, size, dtype=dtype, device=device),
        torch.linspace(0.5, 1.5, size, dtype=dtype, device=device),
        training,
    )
    output = twin(
        plans,
        leaves["before"],
        leaves["previous"],
        leaves["weights"],
        statistics,
        leaves["operations"],
        leaves["edges"],
        active,
    )
    weighting = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
    gradients: Sequence[Tensor | None] = (
        torch.autograd.grad(
            output, [leaves[name] for name in needed], weighting.to(output), allow_unused=True
        )
        if needed
        else ()
    )
    found = {"output": output.detach(), "mean": statistics.mean, "variance": statistics.variance}
    return found | {n: g for n, g in zip(needed, gradients, strict=True) if g is not None}

"""Stages of a progressive search: which operations an edge keeps from one to the next.

P-DARTS (Chen et al., arXiv 1904.12760): each stage has a deeper supernet than the one before it
and fewer operations on every edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.errors import CheckpointError, ConfigurationError

FEWEST = 3  # operations on an edge: beside `none` and a skip that a method may rule out, another


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        operations: that each edge has in it, the strongest of the stage before; None: all.
        deeper: cells that its supernet has more than ``SearchConfig.supernet``.
        skip_dropout: 0 <= p < 1; the chance that a skip is dropped in a step, at the start of the
            stage, for a method that drops them.
    """

    operations: int | None = None
    deeper: int = 0
    skip_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.operations is not None and self.operations < FEWEST:
            raise ConfigurationError(
                f"an edge has at least {FEWEST} operations in a stage, not {self.operations}"
            )
        if self.deeper < 0:
            raise ConfigurationError(f"a stage has at least 0 cells more, not {self.deeper}")
        if not 0 <= self.skip_dropout < 1:
            raise ConfigurationError(
                f"skips are dropped with a chance from 0 to below 1, not {self.skip_dropout}"
            )


def require_operations(dropped: Tensor, stage: Stage) -> None:
    """Return if every edge has as many operations left as ``stage`` says.

    Raises:
        CheckpointError: an edge has not: the supernet that the search begins with is of others.
    """
    counts = set((dropped == 0).sum(-1).flatten().tolist())
    if stage.operations is not None and counts != {stage.operations}:
        raise CheckpointError(
            f"a stage of this search has {stage.operations} operations on each edge, but it would "
            f"begin with {' or '.join(map(str, sorted(counts)))}"
        )


def drop_weakest(weights: Tensor, dropped: Tensor, keep: int) -> Tensor:
    """What is dropped once every edge keeps the ``keep`` operations that weigh most.

    Of equal weights the first operation stays.

    Args:
        weights: mixing weights [..., operations].
        dropped: as ``Supernet.dropped``, of the same shape: the number of the stage after which
            an operation was dropped, 0 where it is still there.

    Returns:
        The same with those that go now, under the number of the stage that ends.
    """
    number = dropped.max() + 1
    left = weights.masked_fill(dropped != 0, -1.0)
    ranked = left.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(dropped, dtype=torch.bool).scatter_(-1, ranked[..., :keep], True)
    return torch.where((dropped == 0) & ~kept, number, dropped)


def dropped_before(dropped: Tensor, stage: int) -> Tensor:
    """``dropped`` as it was when the stage of that number (from 1) began."""
    return torch.where(dropped < stage, dropped, 0)

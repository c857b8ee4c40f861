"""What a long loop tells whoever watches it: a progress bar, a tracking server, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VALIDATION = "validation"  # the phase that ends an epoch: it measures, and nothing learns


@dataclass(frozen=True)
class BatchEvent:
    """Finished batches. ``loss`` and ``accuracy`` (0..1) are running means over the phase."""

    phase: str  # "search", "training" or "validation"
    epoch: int  # from 0
    epochs: int
    batch: int  # finished batches of this epoch and phase, from 1
    batches: int
    images: int  # since the event before
    loss: float
    accuracy: float


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch, by the metric names that every run of the project shares."""

    epoch: int  # from 0
    metrics: Mapping[str, float]


class Observer:
    """Base class that ignores everything; override what you want to see."""

    def on_batch(self, event: BatchEvent) -> None:
        """Called after each batch, and on a GPU after each few."""

    def on_resume(self, records: Sequence[EpochRecord]) -> None:
        """Called when a loop goes on from a checkpoint, with the epochs before it."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Called after each epoch, once its checkpoint is safe on disk."""

    def on_warning(self, tag: str, message: str) -> None:
        """Called when something needs a person's eye, e.g. a collapsing search."""

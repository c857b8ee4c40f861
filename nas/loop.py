"""The loop that searching and training share: epochs of batches that survive being killed."""

from __future__ import annotations

import gc
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import Batch
from nas.errors import CheckpointError, NonFiniteLossError
from nas.observer import VALIDATION, BatchEvent, EpochRecord, Observer

CHECKPOINT_SECONDS = 60.0  # a long epoch is saved this often, so that a kill costs a minute
REPORT_EVERY = 10  # batches between two readings of a GPU's meter: each waits for the device

Item = TypeVar("Item")


class Meter:
    """Running loss and accuracy of an epoch, kept on the device and read only when asked."""

    def __init__(self, device: torch.device) -> None:
        # loss sum, correct, images: one tensor, so that one copy saves or reads it all
        self.totals = torch.zeros(3, dtype=torch.float64).to(device)

    def add(self, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Count a batch of mean ``loss`` and class ``scores`` [B, classes]."""
        with torch.no_grad():
            size = labels.numel()
            self.totals[0] += loss.detach().double() * size
            self.totals[1] += (scores.argmax(1) == labels).sum()
            self.totals[2] += size

    @property
    def images(self) -> float:
        """Images counted so far."""
        return float(self.totals[2])

    def read(self, where: str) -> tuple[float, float]:
        """Mean loss and accuracy (0..1) so far.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        loss, correct, images = self.totals.tolist()
        if images == 0:
            return math.nan, math.nan
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is not finite ({where}): a lower learning rate or a tighter gradient "
                "clip usually mends it"
            )
        return loss / images, correct / images


class Stopwatch:
    """Seconds spent, on top of those of the process that a run resumed from."""

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of this process and of those before it."""
        return self.before + time.perf_counter() - self.started


@contextmanager
def old_objects_spared() -> Iterator[None]:
    """Python's garbage collector leaves alone what exists already.

    The imports alone are 450,000 objects that never become garbage, and going through them
    again and again took 4% of the steps of a small supernet.
    """
    if gc.get_freeze_count():  # the caller's doing, or a loop around this one
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class ResumableLoop(ABC, Generic[Item]):
    """Epochs of batches, saved after each epoch and every minute.

    A subclass draws all its randomness from generators named by epoch and batch, so that a loop
    resumed from its checkpoint ends with the bits of an undisturbed one.

    Attributes:
        phase: what the loop does, for progress bars.
        identity: JSON-able values that a checkpoint must share to be resumed from.
        epoch, batch: the epoch under way and its finished batches; ``steps`` batches an epoch.
        meter: loss and accuracy of the epoch so far.
        records: one for each finished epoch.
    """

    phase: str

    def __init__(
        self, device: torch.device, epochs: int, steps: int, identity: Mapping[str, Any]
    ) -> None:
        self.device = device
        self.epochs = epochs
        self.steps = steps
        self.identity = json.loads(json.dumps(dict(identity)))  # as a checkpoint gives it back
        self.epoch = 0
        self.batch = 0
        self.unreported = 0  # images since the observer last heard
        self.meter = Meter(device)
        self.watch = Stopwatch()
        self.epoch_watch = Stopwatch()
        self.records: list[EpochRecord] = []

    @abstractmethod
    def batches(self) -> Iterator[Item]:
        """What the steps of this epoch take, from ``self.batch`` on."""

    @abstractmethod
    def step(self, item: Item) -> int:
        """Learn from ``item`` and count it in the meter; returns the number of images."""

    @abstractmethod
    def summarise(self, observer: Observer) -> dict[str, float]:
        """The metrics of the epoch that just ended."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that has learnt, for the checkpoint."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave; the epoch is that of the checkpoint already."""

    def is_done(self) -> bool:
        """Whether no epoch is left; a function of what the checkpoint holds."""
        return self.epoch >= self.epochs

    def run_epochs(self, checkpoint: Path | None, observer: Observer) -> None:
        """Run to the end, from ``checkpoint`` where that file exists.

        Raises:
            NonFiniteLossError: the loss left the finite numbers; the last checkpoint stays.
            CheckpointError: the checkpoint is not of this loop, or cannot be written.
        """
        if checkpoint is not None and checkpoint.exists():
            self._restore(load_checkpoint(checkpoint))
            observer.on_resume(self.records)
        else:
            self.watch, self.epoch_watch = Stopwatch(), Stopwatch()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with old_objects_spared():
            self._run_epochs(checkpoint, observer)

    def _run_epochs(self, checkpoint: Path | None, observer: Observer) -> None:
        while not self.is_done():
            self._run_epoch(checkpoint, observer)
            record = EpochRecord(self.epoch, self.summarise(observer))
            self.records.append(record)
            self.epoch, self.batch = self.epoch + 1, 0
            self.meter, self.epoch_watch = Meter(self.device), Stopwatch()
            if checkpoint is not None:
                save_checkpoint(checkpoint, self._state())
            observer.on_epoch(record)

    def validate(
        self,
        scores_of: Callable[[Batch], Tensor],
        batches: Iterable[Batch],
        count: int,
        observer: Observer,
        where: str,
        *,
        done: int = 0,
        total: int | None = None,
    ) -> tuple[float, float]:
        """Mean cross-entropy in nats and accuracy (0..1) over ``batches``.

        Args:
            scores_of: class scores [B, classes] of a batch, without gradients.
            count: number of batches.
            where: what is measured, for the message of an error.
            done, total: batches validated before these in this epoch, and all that will be, for
                ``observer``.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        meter, unreported = Meter(self.device), 0
        for number, batch in enumerate(batches, 1):
            scores = scores_of(batch)
            meter.add(F.cross_entropy(scores, batch.labels), scores, batch.labels)
            unreported += batch.labels.numel()
            if self._is_due(number, count):
                progress = (done + number, total or count)
                observer.on_batch(self._event(VALIDATION, *progress, unreported, meter.read(where)))
                unreported = 0
        return meter.read(where)

    def _run_epoch(self, checkpoint: Path | None, observer: Observer) -> None:
        since_saved = Stopwatch()
        for item in self.batches():
            self.unreported += self.step(item)
            self.batch += 1
            self._report(observer)
            if checkpoint is not None and since_saved.seconds > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, self._state())
                since_saved = Stopwatch()

    def _report(self, observer: Observer) -> None:
        if not self._is_due(self.batch, self.steps):
            return
        read = self.meter.read(f"epoch {self.epoch + 1}, batch {self.batch}")
        observer.on_batch(self._event(self.phase, self.batch, self.steps, self.unreported, read))
        self.unreported = 0

    def _is_due(self, batch: int, batches: int) -> bool:
        return self.device.type == "cpu" or batch % REPORT_EVERY == 0 or batch == batches

    def _event(
        self, phase: str, batch: int, batches: int, images: int, read: tuple[float, float]
    ) -> BatchEvent:
        return BatchEvent(phase, self.epoch, self.epochs, batch, batches, images, *read)

    def _state(self) -> Checkpoint:
        return Checkpoint(
            tensors={**self.tensors(), "meter": self.meter.totals},
            values={
                "identity": self.identity,
                "epoch": self.epoch,
                "batch": self.batch,
                "seconds": self.watch.seconds,
                "epoch_seconds": self.epoch_watch.seconds,
                "records": [dict(record.metrics) for record in self.records],
            },
        )

    def _restore(self, state: Checkpoint) -> None:
        values = state.values
        if values.get("identity") != self.identity:
            raise CheckpointError(
                f"the checkpoint is of another {self.phase}: data, settings or seed differ"
            )
        try:
            self.epoch, self.batch = values["epoch"], values["batch"]
            self.load_tensors(state.tensors)
            self.meter.totals.copy_(state.tensors["meter"])
            self.watch = Stopwatch(values["seconds"])
            self.epoch_watch = Stopwatch(values["epoch_seconds"])
            self.records = [EpochRecord(e, metrics) for e, metrics in enumerate(values["records"])]
        except KeyError as error:
            raise CheckpointError(f"the checkpoint of this {self.phase} lacks {error}") from error

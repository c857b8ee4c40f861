"""The loop that searching and training share, driven by a loop with nothing to learn."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nas.loop
from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.errors import CheckpointError, NonFiniteLossError
from nas.loop import Meter, ResumableLoop, Stopwatch
from nas.observer import BatchEvent, EpochRecord, Observer

CPU = torch.device("cpu")


class Counting(ResumableLoop[int]):
    """Adds up the numbers of its batches; batch b of epoch e is 10 e + b."""

    phase = "counting"

    def __init__(self, *, epochs: int = 2, steps: int = 3, loss: float = 0.5) -> None:
        super().__init__(CPU, epochs, steps, {"steps": steps})
        self.total = torch.zeros(1)
        self.loss = loss
        self.taken: list[int] = []

    def batches(self) -> Iterator[int]:
        return iter(range(10 * self.epoch + self.batch, 10 * self.epoch + self.steps))

    def step(self, item: int) -> int:
        self.taken.append(item)
        self.total += item
        scores = torch.tensor([[1.0, 0.0]]).expand(4, -1)
        self.meter.add(torch.tensor(self.loss), scores, torch.tensor([0, 0, 0, 1]))
        return 4

    def summarise(self, observer: Observer) -> dict[str, float]:
        loss, accuracy = self.meter.read("here")
        return {"loss": loss, "accuracy": accuracy, "images": self.meter.images}

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.total.copy_(tensors["total"])


class Stopping(Observer):
    def __init__(self, after: int) -> None:
        self.left = after

    def on_batch(self, event: BatchEvent) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_all_batches_of_all_epochs() -> None:
    loop = Counting()
    loop.run_epochs(None, Observer())
    assert loop.taken == [0, 1, 2, 10, 11, 12]
    metrics = {"loss": 0.5, "accuracy": 0.75, "images": 12.0}  # each epoch has its own meter
    assert loop.records == [EpochRecord(0, metrics), EpochRecord(1, metrics)]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("kill", range(1, 7))
def test_killed_at_any_batch(
    kill: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt):
        Counting().run_epochs(tmp_path / "c", Stopping(kill))
    loop = Counting()
    loop.run_epochs(tmp_path / "c", Observer())
    whole = [0, 1, 2, 10, 11, 12]
    # a batch is reported before it is saved; without saves inside the epoch, that begins anew
    done = kill - 1 if seconds == 0 else (kill - 1) // 3 * 3
    assert loop.taken == whole[done:]
    assert loop.total.item() == sum(whole)
    undisturbed = Counting()
    undisturbed.run_epochs(None, Observer())
    assert loop.records == undisturbed.records


def test_a_gpu_is_read_now_and_then_and_at_the_end() -> None:
    loop = Counting()
    assert [batch for batch in range(1, 4) if loop._is_due(batch, 3)] == [1, 2, 3]
    loop.device = torch.device("cuda")  # each reading waits for it
    assert [batch for batch in range(1, 26) if loop._is_due(batch, 25)] == [10, 20, 25]


class Watching(Counting):
    frozen = 0

    def step(self, item: int) -> int:
        self.frozen = gc.get_freeze_count()
        return super().step(item)


def test_the_garbage_collector_spares_old_objects_while_it_runs() -> None:
    loop = Watching()
    with pytest.raises(KeyboardInterrupt):
        loop.run_epochs(None, Stopping(2))
    assert loop.frozen > 10_000
    assert gc.get_freeze_count() == 0
    loop.run_epochs(None, Observer())
    loop.cycle = loop  # type: ignore[attr-defined]
    left = weakref.ref(loop)
    del loop
    gc.collect()
    assert left() is None


def test_what_the_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        Watching().run_epochs(None, Observer())
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_an_epoch_is_reported_once_it_is_safe(tmp_path: Path) -> None:
    saved: list[tuple[int, int]] = []

    class Reader(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            values = load_checkpoint(tmp_path / "c").values
            saved.append((record.epoch, values["epoch"]))

    Counting().run_epochs(tmp_path / "c", Reader())
    assert saved == [(0, 1), (1, 2)]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_place(loss: float, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 1"):
        Counting(loss=loss).run_epochs(tmp_path / "c", Observer())
    assert not (tmp_path / "c").exists()


def test_another_identity_is_refused(tmp_path: Path) -> None:
    Counting().run_epochs(tmp_path / "c", Observer())
    with pytest.raises(CheckpointError, match="of another counting: data, settings or seed differ"):
        Counting(steps=4).run_epochs(tmp_path / "c", Observer())


@pytest.mark.parametrize("lost", ["total", "meter", "epoch", "records"])
def test_a_checkpoint_that_lacks_something_is_refused(lost: str, tmp_path: Path) -> None:
    Counting().run_epochs(tmp_path / "c", Observer())
    state = load_checkpoint(tmp_path / "c")
    tensors = {name: tensor for name, tensor in state.tensors.items() if name != lost}
    values = {name: value for name, value in state.values.items() if name != lost}
    save_checkpoint(tmp_path / "c", Checkpoint(tensors, values))
    with pytest.raises(CheckpointError, match=f"of this counting lacks '{lost}'"):
        Counting().run_epochs(tmp_path / "c", Observer())


def test_time_goes_on_after_a_kill(tmp_path: Path) -> None:
    Counting().run_epochs(tmp_path / "c", Observer())
    state = load_checkpoint(tmp_path / "c")
    values = {**state.values, "seconds": 1000.0, "epoch": 1, "batch": 0}
    values["records"] = values["records"][:1]
    save_checkpoint(tmp_path / "c", Checkpoint(state.tensors, values))
    loop = Counting()
    loop.run_epochs(tmp_path / "c", Observer())
    assert 1000.0 <= loop.watch.seconds < 1100.0
    assert Stopwatch(5.0).seconds >= 5.0


def test_meter_weighs_batches_by_their_size() -> None:
    meter = Meter(CPU)
    for size, right in ((3, 2), (5, 1)):
        labels = torch.zeros(size, dtype=torch.int64)
        scores = torch.zeros(size, 2)
        scores[right:, 1] = 1.0
        meter.add(F.cross_entropy(scores, labels), scores, labels)
    loss, accuracy = meter.read("here")
    assert accuracy == pytest.approx(3 / 8)
    right, wrong = math.log(2), math.log(1 + math.e)
    assert loss == pytest.approx((3 * right + 5 * wrong) / 8)
    assert meter.images == 8


def test_an_empty_meter_reads_no_number() -> None:
    assert all(math.isnan(value) for value in Meter(CPU).read("here"))

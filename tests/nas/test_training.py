"""Training of one network: the recipe, its presets, resuming."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nas.loop
from nas.architecture import Architecture, Skeleton
from nas.data import Batches, ImageTask
from nas.errors import CheckpointError, ConfigurationError, NonFiniteLossError, UnknownNameError
from nas.observer import BatchEvent, EpochRecord, Observer
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED
from nas.training import TRAINING_PRESETS, TrainConfig, Training

CPU = torch.device("cpu")
ARCHITECTURE = DartsSpace().from_genotype(PUBLISHED["DARTS_V2"], Skeleton("cifar", 4, 3))
# Everything that draws or remembers is on: drop-path, cutout, crops, auxiliary head, momentum.
CONFIG = TrainConfig(
    epochs=2, batch_size=32, drop_path=0.4, cutout=3, crop_padding=1, auxiliary_weight=0.4
)
MEASURED = {"images_per_second", "epoch_seconds", "peak_memory_mb"}


class KilledError(Exception):
    pass


class Killer(Observer):
    """Ends the training after so many batches, those of its validations among them."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_batch(self, event: BatchEvent) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError


def make(
    task: ImageTask,
    config: TrainConfig = CONFIG,
    *,
    architecture: Architecture = ARCHITECTURE,
    seed: int = 0,
    device: torch.device = CPU,
) -> Training:
    return Training(task, architecture, config, seed=seed, device=device)


def outcome(training: Training) -> dict[str, object]:
    """All that a training ends with but the time it took."""
    tensors = {
        name: tensor.detach().cpu().contiguous().numpy().tobytes()
        for name, tensor in training.tensors().items()
    }
    metrics = [
        {name: value for name, value in record.metrics.items() if name not in MEASURED}
        for record in training.records
    ]
    return {**tensors, "metrics": metrics}


def finished(training: Training, checkpoint: Path | None = None) -> dict[str, object]:
    training.run(checkpoint)
    return outcome(training)


# ---- recipe ----


def test_presets_are_the_papers() -> None:
    assert TRAINING_PRESETS["paper-cifar"] == TrainConfig(
        epochs=600, batch_size=96, learning_rate=0.025, schedule="cosine", momentum=0.9,
        weight_decay=3e-4, gradient_clip=5.0, label_smoothing=0.0, auxiliary_weight=0.4,
        drop_path=0.2, cutout=16, crop_padding=4, random_resized_crop=False, color_jitter=0.0,
        flip=True,
    )  # fmt: skip
    assert TRAINING_PRESETS["paper-imagenet"] == TrainConfig(
        epochs=250, batch_size=128, learning_rate=0.1, schedule="exponential", decay=0.97,
        momentum=0.9, weight_decay=3e-5, gradient_clip=5.0, label_smoothing=0.1,
        auxiliary_weight=0.4, drop_path=0.0, cutout=0, crop_padding=0, random_resized_crop=True,
        color_jitter=0.4, flip=True,
    )  # fmt: skip
    assert set(TRAINING_PRESETS) == {"quick", "paper-cifar", "paper-imagenet"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        TrainConfig(schedule="cosinus")
    for wrong in ({"epochs": 0}, {"batch_size": 1}):
        with pytest.raises(ConfigurationError):
            TrainConfig(**wrong)


def test_learning_rates() -> None:
    cosine = TrainConfig(epochs=10, learning_rate=0.2)
    assert cosine.learning_rate_at(0) == 0.2
    assert cosine.learning_rate_at(5) == pytest.approx(0.1)
    assert cosine.learning_rate_at(9) == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert cosine.learning_rate_at(10) == pytest.approx(0.0, abs=1e-15)
    imagenet = TRAINING_PRESETS["paper-imagenet"]
    assert [imagenet.learning_rate_at(e) for e in (0, 1, 2)] == pytest.approx([0.1, 0.097, 0.09409])


def test_rate_and_drop_path_are_set_each_epoch(few_digits: ImageTask) -> None:
    training = make(few_digits, replace(CONFIG, epochs=4, drop_path=0.2))
    seen = []
    for training.epoch in range(4):
        training.batches()
        seen.append((
            training.optimiser.param_groups[0]["lr"], training.network.drop_path_probability
        ))  # fmt: skip
    assert [p for _, p in seen] == pytest.approx([0.0, 0.05, 0.1, 0.15])  # p * epoch / epochs
    assert [r for r, _ in seen] == [training.config.learning_rate_at(epoch) for epoch in range(4)]


def test_a_step_is_clipped_sgd_on_both_heads(few_digits: ImageTask) -> None:
    config = replace(CONFIG, drop_path=0.0, gradient_clip=0.5, label_smoothing=0.1)
    training = make(few_digits, config)
    twin = copy.deepcopy(training.network).train()
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    for batch, _ in zip(training.batches(), range(2), strict=False):
        scores, auxiliary = twin(batch.images), twin.forward_with_auxiliary(batch.images)[1]
        assert auxiliary is not None
        loss = sum(
            weight * F.cross_entropy(s, batch.labels, label_smoothing=0.1)
            for weight, s in ((1.0, scores), (0.4, auxiliary))
        )
        optimiser.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
        assert norm > 0.5
        for parameter in twin.parameters():
            parameter.grad *= 0.5 / norm
        optimiser.step()
        training.step(batch)
        for ours, theirs in zip(training.network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_auxiliary_weight_there_is_no_head(few_digits: ImageTask) -> None:
    assert make(few_digits).network.auxiliary_head is not None
    assert make(few_digits, replace(CONFIG, auxiliary_weight=0.0)).network.auxiliary_head is None


def test_it_learns_from_train_and_reports_validation(few_digits: ImageTask) -> None:
    training = make(few_digits)
    assert training.train_batches.images_per_epoch == len(few_digits.splits.train) // 32 * 32
    assert training.validation_batches.images_per_epoch == len(few_digits.splits.val)
    result = training.run()
    metrics = result.records[-1].metrics
    assert set(metrics) == {
        "train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", *MEASURED
    }  # fmt: skip
    assert result.validation_accuracy == metrics["val/accuracy"]
    network = result.network.eval()
    labels = few_digits.labels[few_digits.splits.val]
    with torch.no_grad():
        (batch,) = training.validation_batches.epoch()
        accuracy = (network(batch.images).argmax(1) == labels).double().mean().item()
    assert metrics["val/accuracy"] == pytest.approx(accuracy)


def test_losses_are_reported_without_label_smoothing(few_digits: ImageTask) -> None:
    config = replace(CONFIG, epochs=1, drop_path=0.0, label_smoothing=0.4)
    training = make(few_digits, config)
    twin = copy.deepcopy(training.network).train()
    batch = next(training.train_batches.epoch())
    training.batches()
    training.step(batch)
    assert training.meter.read("here")[0] == pytest.approx(
        F.cross_entropy(twin(batch.images), batch.labels).item(), rel=1e-5
    )
    training = make(few_digits, config)
    metrics = training.run().records[0].metrics
    (batch,) = training.validation_batches.epoch()
    with torch.no_grad():
        scores = training.network.eval()(batch.images)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(scores, batch.labels).item())


def test_validation_is_told_batch_by_batch(few_digits: ImageTask) -> None:
    seen: list[BatchEvent] = []

    class Watch(Observer):
        def on_batch(self, event: BatchEvent) -> None:
            seen.append(event)

    training = make(few_digits, replace(CONFIG, epochs=1))
    training.validation_batches = Batches(
        few_digits, few_digits.splits.val, 12, seed=0, stream="validation"
    )
    images = len(few_digits.splits.val)
    metrics = training.run(observer=Watch()).records[0].metrics
    assert [event.phase for event in seen] == 4 * ["training"] + -(-images // 12) * ["validation"]
    validation = seen[4:]
    assert [event.batch for event in validation] == list(range(1, len(validation) + 1))
    assert {event.batches for event in validation} == {len(validation)}
    assert sum(event.images for event in validation) == images
    assert validation[-1].loss == metrics["val/loss"]
    assert validation[-1].accuracy == metrics["val/accuracy"]


# ---- repeatable and resumable ----


@pytest.fixture(scope="module")
def undisturbed(few_digits: ImageTask) -> dict[str, object]:
    return finished(make(few_digits))


def test_a_seed_decides_every_bit(few_digits: ImageTask, undisturbed: dict[str, object]) -> None:
    torch.manual_seed(77)
    assert finished(make(few_digits)) == undisturbed
    other = finished(make(few_digits, seed=1))
    assert other["network.classifier.weight"] != undisturbed["network.classifier.weight"]


# 4 batches of training and 1 of validation an epoch: the fifth and the tenth are validations
@pytest.mark.parametrize(
    ("kill", "every_batch"), [(2, True), (5, True), (7, False), (8, True), (10, True)]
)
def test_killed_and_resumed_ends_with_the_same_bits(
    kill: int,
    every_batch: bool,
    few_digits: ImageTask,
    undisturbed: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if every_batch:
        monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)
    assert make(few_digits).steps == 4
    with pytest.raises(KilledError):
        make(few_digits).run(tmp_path / "c", Killer(kill))
    assert finished(make(few_digits), tmp_path / "c") == undisturbed


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"config": replace(CONFIG, cutout=2)},
     {"architecture": ARCHITECTURE.with_skeleton(Skeleton("cifar", 6, 3))}],
)  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(
    other: dict[str, object], few_digits: ImageTask, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        make(few_digits).run(tmp_path / "c", Killer(6))
    with pytest.raises(CheckpointError, match="another training"):
        make(few_digits, **other).run(tmp_path / "c")  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_it(few_digits: ImageTask) -> None:
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, batch \d"):
        make(few_digits, replace(CONFIG, learning_rate=1e30, gradient_clip=1e30)).run()


# ---- does it learn ----


def test_digits_are_learnt(all_digits: ImageTask) -> None:
    """Five epochs of a small network; a linear model is near 95 %, chance at 10 %."""
    genotype = PUBLISHED["PC_DARTS_CIFAR"]
    architecture = DartsSpace().from_genotype(genotype, Skeleton("cifar", 8, 3))
    config = replace(
        TRAINING_PRESETS["quick"], epochs=4, batch_size=48, auxiliary_weight=0.0, cutout=0,
        crop_padding=1, drop_path=0.0, learning_rate=0.1,
    )  # fmt: skip
    result = make(all_digits, config, architecture=architecture).run()
    assert result.validation_accuracy > 0.8


def test_epochs_are_reported(few_digits: ImageTask) -> None:
    seen: list[EpochRecord] = []

    class Watch(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            seen.append(record)

    result = make(few_digits).run(observer=Watch())
    assert seen == list(result.records)
    assert [record.epoch for record in seen] == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(few_digits: ImageTask, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    result = make(few_digits, config, device=torch.device("cuda")).run(tmp_path / "c")
    assert next(result.network.parameters()).is_cuda
    assert math.isfinite(result.records[0].metrics["val/loss"])
    again = make(few_digits, config, device=torch.device("cuda"))
    assert again.run(tmp_path / "c").validation_accuracy == result.validation_accuracy

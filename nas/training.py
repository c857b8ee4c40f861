"""Train one concrete network: the recipe of the DARTS papers, and its scaled presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.architecture import Architecture
from nas.data import Augmentation, Batch, Batches, ImageTask
from nas.errors import ConfigurationError, UnknownNameError
from nas.evaluation import evaluating
from nas.hardware import mixed_precision, peak_memory_mb
from nas.loop import ResumableLoop
from nas.observer import EpochRecord, Observer
from nas.optimisation import (
    copy_tensors,
    cosine,
    pack_optimiser,
    restore_optimiser,
    set_learning_rate,
    with_prefix,
    without_prefix,
)
from nas.randomness import generator
from nas.spaces import find_space
from nas.spaces.base import Network


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; the defaults are the CIFAR-10 evaluation of DARTS (its section 3.2).

    Attributes:
        schedule: "cosine" to 0, or "exponential": times ``decay`` each epoch.
        auxiliary_weight: share of the auxiliary head's loss; 0 builds none.
        drop_path: epoch e of E drops paths with probability ``drop_path`` e / E.
        cutout: side of the square that is blanked in each image, in pixels.
        random_resized_crop, color_jitter: the ImageNet augmentation.
        flip: mirror images, where the data allow it.
    """

    epochs: int = 600
    batch_size: int = 96
    learning_rate: float = 0.025
    schedule: str = "cosine"
    decay: float = 0.97
    momentum: float = 0.9
    weight_decay: float = 3e-4
    gradient_clip: float = 5.0
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.4
    drop_path: float = 0.2
    cutout: int = 16
    crop_padding: int = 4
    random_resized_crop: bool = False
    color_jitter: float = 0.0
    flip: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:  # a batch is normalised by its own statistics
            raise ConfigurationError(
                "training needs at least 1 epoch and a batch size of at least 2, not "
                f"{self.epochs} and {self.batch_size}"
            )
        if self.schedule not in ("cosine", "exponential"):
            raise UnknownNameError("schedule", self.schedule, ("cosine", "exponential"))

    def learning_rate_at(self, epoch: int) -> float:
        """Learning rate of ``epoch`` (from 0)."""
        if self.schedule == "cosine":
            return cosine(self.learning_rate, 0.0, epoch, self.epochs)
        return self.learning_rate * self.decay**epoch


TRAINING_PRESETS: dict[str, TrainConfig] = {
    # minutes on two cores: the paper's recipe with every strength scaled to a handful of epochs
    "quick": TrainConfig(
        epochs=2, batch_size=64, learning_rate=0.1, drop_path=0.05, cutout=3, crop_padding=1
    ),
    "paper-cifar": TrainConfig(),
    "paper-imagenet": TrainConfig(
        epochs=250,
        batch_size=128,
        learning_rate=0.1,
        schedule="exponential",
        weight_decay=3e-5,
        label_smoothing=0.1,
        drop_path=0.0,
        cutout=0,
        crop_padding=0,
        random_resized_crop=True,
        color_jitter=0.4,
    ),
}


@dataclass(frozen=True)
class TrainingResult:
    """A trained network and how it got there.

    ``validation_accuracy`` (0..1) is that of the last epoch: no epoch is picked by it.
    """

    network: Network
    records: Sequence[EpochRecord]
    validation_accuracy: float
    seconds: float


class Training(ResumableLoop[Batch]):
    """Training of one architecture: a pure function of (task, architecture, config, seed)."""

    phase = "training"

    def __init__(
        self,
        task: ImageTask,
        architecture: Architecture,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        network = find_space(architecture.space).network(
            architecture,
            task.shape,
            auxiliary=config.auxiliary_weight > 0,
            generator=generator(seed, "training", "weights"),
        )
        self.network = network.to(memory_format=torch.channels_last).to(device)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._make_batches(task, workers)
        super().__init__(
            device,
            config.epochs,
            len(self.train_batches),
            {
                "task": task.digest,
                "architecture": architecture.to_json(),
                "config": asdict(config),
                "seed": seed,
            },
        )

    def run(
        self, checkpoint: Path | None = None, observer: Observer | None = None
    ) -> TrainingResult:
        """Train to the end; see :meth:`ResumableLoop.run_epochs`."""
        self.run_epochs(checkpoint, observer or Observer())
        accuracy = self.records[-1].metrics["val/accuracy"]
        return TrainingResult(self.network, self.records, accuracy, self.watch.seconds)

    def batches(self) -> Iterator[Batch]:
        """The training batches, once rate and drop-path are set for the epoch."""
        config = self.config
        set_learning_rate(self.optimiser, config.learning_rate_at(self.epoch))
        self.network.drop_path_probability = config.drop_path * self.epoch / config.epochs
        self.network.train()
        return self.train_batches.epoch(self.epoch, self.batch)

    def step(self, item: Batch) -> int:
        """One step of SGD on the loss and the auxiliary loss."""
        self.network.drop_path_generator = generator(
            self.seed, "training", "drop-path", self.epoch, self.batch, device=self.device
        )
        with mixed_precision(self.device):
            scores, auxiliary = self.network.forward_with_auxiliary(item.images)
        loss = self._loss(scores, item.labels)
        if auxiliary is not None:
            loss = loss + self.config.auxiliary_weight * self._loss(auxiliary, item.labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        self.optimiser.step()
        with torch.no_grad():  # without smoothing, so that recipes and splits compare
            reported = F.cross_entropy(scores.float(), item.labels)
        self.meter.add(reported, scores, item.labels)
        return item.labels.numel()

    def summarise(self, observer: Observer) -> dict[str, float]:
        """Metrics of the epoch; the validation split is not trained on."""
        seconds = self.epoch_watch.seconds
        loss, accuracy = self.meter.read(f"epoch {self.epoch + 1}")
        with evaluating(self.network):
            validation_loss, validation_accuracy = self.validate(
                self._scores,
                self.validation_batches.epoch(),
                len(self.validation_batches),
                observer,
                "the validation split",
            )
        return {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "val/loss": validation_loss,
            "val/accuracy": validation_accuracy,
            "lr": self.config.learning_rate_at(self.epoch),
            "images_per_second": self.meter.images / seconds,
            "epoch_seconds": self.epoch_watch.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Network and optimiser."""
        return {
            **with_prefix("network", self.network.state_dict()),
            **pack_optimiser("optimiser", self.optimiser),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        copy_tensors(self.network.state_dict(), without_prefix("network", tensors), "this training")
        restore_optimiser("optimiser", self.optimiser, tensors)

    def _scores(self, batch: Batch) -> Tensor:
        with mixed_precision(self.device):
            scores: Tensor = self.network(batch.images)
        return scores.float()

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.config.label_smoothing)

    def _make_batches(self, task: ImageTask, workers: int) -> None:
        config = self.config
        self.train_batches = Batches(
            task,
            task.splits.train,
            config.batch_size,
            seed=self.seed,
            stream="training",
            device=self.device,
            augmentation=Augmentation(
                crop_padding=config.crop_padding,
                flip=config.flip and task.flip,
                cutout=config.cutout,
                random_resized_crop=config.random_resized_crop,
                color_jitter=config.color_jitter,
            ),
            shuffle=True,
            drop_last=True,
            workers=workers,
        )
        self.validation_batches = Batches(
            task,
            task.splits.val,
            max(config.batch_size, 256),
            seed=self.seed,
            stream="validation",
            device=self.device,
            workers=workers,
        )

"""The bilevel loop that all differentiable searches share.

Each step gives one batch of either half of the data to the two levels: the architecture
parameters go down the validation gradient, then the weights go down the training gradient
(DARTS, algorithm 1). What a method changes is a hook of :class:`nas.search.method.Method`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import Batch, ImageTask
from nas.errors import ConfigurationError
from nas.hardware import peak_memory_mb
from nas.loop import ResumableLoop
from nas.observer import EpochRecord, Observer
from nas.ops.backend import AUTO, FLOAT32, STORAGES
from nas.optimisation import (
    copy_tensors,
    cosine,
    flat_sgd,
    pack_optimiser,
    restore_optimiser,
    set_learning_rate,
    with_prefix,
    without_prefix,
)
from nas.search.classifier import fit_heads
from nas.search.collapse import collapse_metrics
from nas.search.method import Method, SearchConfig
from nas.search.replay import OFF, Capture, Replayed, capture_graph, choose_graphs
from nas.search.sources import SQUARE_ROOT, Pair, Sources
from nas.search.stages import Stage, drop_weakest, require_operations
from nas.search.stopping import AGE, Stop
from nas.spaces import find_space
from nas.spaces.darts.genotype import Genotype
from nas.spaces.darts.supernet import Mixing, Supernet

VALIDATIONS = 2  # an epoch: the mixed supernet's, and that of its discretised form


class Start(Protocol):
    """What a search begins with instead of the weights of its seed."""

    def identity(self) -> dict[str, Any]:
        """JSON-able: what tells this beginning from others."""

    @property
    def fits_classifier(self) -> bool:
        """Whether the new classifier is fitted to the features of ``target`` before all else."""

    def apply(self, target: Supernet) -> None:
        """Overwrite what the fresh ``target`` is to begin with."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind.

    Attributes:
        genotype: the discrete cells.
        supernet: of the last stage: weights, architecture parameters and statistics at the end.
        records: the metrics of each epoch.
        mixing_history: mixing weights after each epoch, [epochs, 2, 14, 8]; 0 where an operation
            was dropped.
        seconds: time spent, including that of earlier, killed processes.
        stopped: why it ended before its last epoch; None where it did not.
    """

    genotype: Genotype
    supernet: Supernet
    records: Sequence[EpochRecord]
    mixing_history: Tensor
    seconds: float
    stopped: Stop | None


class BilevelSearch(ResumableLoop[Pair]):
    """One search: a supernet, its two optimisers and the two halves of the data.

    A pure function of (tasks, sampling, space, method, config, seed, start, storage).

    Args:
        task: a data set, or several for one supernet; see :mod:`nas.search.sources`.
        storage: how the supernet keeps images between its cells, "float32" or "bfloat16".
        start: what to begin with instead of the weights of ``seed``.
        sampling: of several sets, how a step chooses one: "sqrt" by the root of their sizes, or
            "uniform".
        cuda_graphs: "auto" or "off"; see :func:`nas.search.replay.choose_graphs`.
    """

    phase = "search"

    def __init__(
        self,
        task: ImageTask | Sequence[ImageTask],
        method: Method,
        config: SearchConfig,
        *,
        seed: int,
        device: torch.device,
        workers: int = 0,
        space: str = "darts",
        backend: str = AUTO,
        storage: str = FLOAT32,
        start: Start | None = None,
        sampling: str = SQUARE_ROOT,
        cuda_graphs: str = OFF,
    ) -> None:
        if storage in STORAGES and storage not in method.storages:
            raise ConfigurationError(
                f"storage '{storage}' is too coarse for the gradients of method '{method.name}'; "
                f"it has {' or '.join(method.storages)}"
            )
        tasks = [task] if isinstance(task, ImageTask) else list(task)
        self.method = method
        self.config = config
        self.seed = seed
        self.device = device
        self.sources = Sources(tasks, config, sampling, seed=seed, device=device, workers=workers)
        self._space, self._backend, self._storage = space, backend, storage
        self._cuda_graphs = cuda_graphs
        self.heads: tuple[slice | None, slice | None] = (None, None)  # of the batches at hand
        self._fits_classifier = start is not None and start.fits_classifier
        self._begin(0, start)
        self.mixing_history: list[Tensor] = []
        self.genotype_digest = torch.zeros(32, dtype=torch.uint8)  # of the epoch before
        super().__init__(
            device,
            config.epochs * len(config.stages),
            self.sources.steps,
            {
                "tasks": [task.digest for task in tasks],
                "sampling": sampling,
                "space": space,
                "method": method.name,
                "config": asdict(config),
                "seed": seed,
                "backend": self.supernet.backend.name,
                "storage": storage,
                "start": start.identity() if start is not None else None,
            },
        )

    def _begin(self, stage: int, start: Start | None = None) -> None:
        """The supernet of stage number ``stage``, from ``start`` or the seed; its optimisers."""
        config = self.config
        supernet = find_space(self._space).supernet(
            self.sources.shape,
            config.supernet_of(stage),
            seed=self.seed,
            backend=self._backend,
            storage=self._storage,
        )
        if start is not None:
            start.apply(supernet)
            require_operations(supernet.dropped, config.stages[stage])
        self.supernet = supernet.to(self.device)
        self.weight_optimiser = flat_sgd(
            self.supernet.weights,
            self.device,
            rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.architecture_optimiser = torch.optim.Adam(
            self.supernet.architecture_parameters(),
            lr=config.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=config.architecture_weight_decay,
            capturable=self.device.type == "cuda",
        )
        self.weights_replayed: Replayed | None = None
        self.architecture_replayed: Replayed | None = None
        self.graphs = choose_graphs(
            self._cuda_graphs, self.device, self.supernet.backend.name, self.method
        )
        if self.graphs.used:
            self.capture_steps()

    @property
    def stage_number(self) -> int:
        """Of the stage under way, from 0; after the last epoch the last."""
        return min(self.epoch // self.config.epochs, len(self.config.stages) - 1)

    @property
    def stage(self) -> Stage:
        """The stage under way."""
        return self.config.stages[self.stage_number]

    @property
    def stage_epoch(self) -> int:
        """Epochs since the stage began."""
        return self.epoch - self.stage_number * self.config.epochs

    @property
    def learning_rate(self) -> float:
        """Of the weights, in this epoch."""
        config = self.config
        return cosine(
            config.learning_rate, config.learning_rate_end, self.stage_epoch, config.epochs
        )

    def run(self, checkpoint: Path | None = None, observer: Observer | None = None) -> SearchResult:
        """Search to the end; see :meth:`ResumableLoop.run_epochs`."""
        self.run_epochs(checkpoint, observer or Observer())
        mixing = self.method.mixing(self.supernet).detach()
        return SearchResult(
            self.method.derive(self, mixing),
            self.supernet,
            self.records,
            torch.stack(self.mixing_history),
            self.watch.seconds,
            self.stop,
        )

    @property
    def stop(self) -> Stop | None:
        """Why this search has ended early, from what it has recorded; None where it goes on."""
        config = self.config
        before = config.epochs * (len(config.stages) - 1) + config.warmup_epochs
        return config.stopping.judge(self.records[before:])

    def is_done(self) -> bool:
        """After the last epoch, or where a rule of ``config.stopping`` says so."""
        return super().is_done() or self.stop is not None

    def loss(
        self,
        batch: Batch,
        mixing: Mixing,
        weights: Tensor | None = None,
        *,
        update_statistics: bool = True,
    ) -> Tensor:
        """Mean cross-entropy of ``batch`` under ``mixing``, with ``weights`` if given."""
        return F.cross_entropy(
            self._scores(batch, mixing, weights, update_statistics), batch.labels
        )

    def batches(self) -> Iterator[Pair]:
        """Pairs of a training and a validation batch."""
        set_learning_rate(self.weight_optimiser, self.learning_rate)
        self.supernet.train()
        if self._fits_classifier and self.epoch == self.batch == 0:  # in the first epoch's seconds
            mixing = self.method.mixing(self.supernet).detach()
            fit_heads(
                self.supernet.linear_classifier(),
                lambda images: self.supernet.features(images, mixing),
                self.sources.beginnings(),
            )
        return self.sources.pairs(self.epoch, self.batch)

    def step(self, item: Pair) -> int:
        """The architecture step, unless it is still frozen, and the weight step."""
        train, validation = item
        if self.stage_epoch >= self.config.warmup_epochs:
            self.architecture_step(train, validation)
        self.weight_step(train)
        return train.labels.numel() + validation.labels.numel()

    def capture_steps(self, capture: Capture = capture_graph) -> None:
        """Replay both steps from captures from now on.

        Another batch size or set of active operations captures anew.
        """
        self.weights_replayed = Replayed(self._move_weights, capture)
        self.architecture_replayed = Replayed(self._move_architecture, capture)

    def architecture_step(self, train: Batch, validation: Batch) -> None:
        """Move the architecture parameters; no gradient of the weights is asked for."""
        inputs = (train.images, train.labels, validation.images, validation.labels)
        self.heads = (train.head, validation.head)
        if self.architecture_replayed is None:
            self._move_architecture(*inputs)
        else:
            self.architecture_replayed(self._kind(self.method.mixing(self.supernet)), *inputs)

    def weight_step(self, train: Batch) -> None:
        """Move the weights; no gradient of the architecture parameters is asked for."""
        self.heads = (train.head, None)
        if self.weights_replayed is None:
            loss, scores = self._move_weights(train.images, train.labels)
        else:
            kind = self._kind(self.method.weight_mixing(self))
            loss, scores = self.weights_replayed(kind, train.images, train.labels)
        self.meter.add(loss, scores, train.labels)

    def _kind(self, mixing: Mixing) -> tuple[bytes | None, str]:
        """What a capture has in it beside tensors."""
        active = None if mixing.active is None else mixing.active.numpy().tobytes()
        return active, str(self.heads)

    def _move_architecture(
        self, images: Tensor, labels: Tensor, other_images: Tensor, other_labels: Tensor
    ) -> tuple[Tensor, ...]:
        parameters = self.supernet.architecture_parameters()
        train = Batch(images, labels, self.heads[0])
        validation = Batch(other_images, other_labels, self.heads[1])
        gradients = self.method.architecture_gradients(self, train, validation)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.architecture_optimiser.step()
        return ()

    def _move_weights(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        weights = self.supernet.weights
        batch = Batch(images, labels, self.heads[0])
        scores = self._scores(batch, self.method.weight_mixing(self).detach())
        loss = F.cross_entropy(scores, labels)
        (weights.grad,) = torch.autograd.grad(loss, [weights])
        torch.nn.utils.clip_grad_norm_([weights], self.config.gradient_clip)
        self.weight_optimiser.step()
        return loss.detach(), scores.detach()

    def accuracy(
        self, mixing: Mixing, observer: Observer | None = None, part: int = 0
    ) -> list[tuple[float, float]]:
        """Loss and accuracy of the supernet under ``mixing`` on each set's validation half.

        Normalised by the statistics of each batch: the running ones were gathered under other
        mixing weights, and would measure how stale they are instead of how good the cell is.

        Args:
            part: which of the epoch's ``VALIDATIONS`` this is, for ``observer``.
        """
        self.supernet.train()
        counts = [len(source.evaluation) for source in self.sources.each]
        done = part * sum(counts)
        measured = []
        with torch.no_grad():
            for count, batches in zip(counts, self.sources.evaluations(), strict=True):
                measured.append(
                    self.validate(
                        lambda batch: self._scores(batch, mixing, update_statistics=False),
                        batches,
                        count,
                        observer or Observer(),
                        "the supernet on the validation half",
                        done=done,
                        total=VALIDATIONS * sum(counts),
                    )
                )
                done += count
        return measured

    def _scores(
        self,
        batch: Batch,
        mixing: Mixing,
        weights: Tensor | None = None,
        update_statistics: bool = True,
    ) -> Tensor:
        # Computed in full precision on a GPU too, however images are stored: differences between
        # operations are what a search is after.
        scores: Tensor = self.supernet(
            batch.images, mixing, weights=weights, update_statistics=update_statistics
        )
        return scores if batch.head is None else scores[:, batch.head]

    def summarise(self, observer: Observer) -> dict[str, float]:
        """Metrics of the epoch, with the signs of collapse."""
        training_seconds = self.epoch_watch.seconds
        loss, accuracy = self.meter.read(f"epoch {self.epoch + 1}")
        mixing = self.method.mixing(self.supernet).detach()
        genotype = self.method.derive(self, mixing)
        losses, accuracies = zip(*self.accuracy(mixing, observer), strict=True)
        validation_accuracy = fmean(accuracies)
        discretised = fmean(
            value for _, value in self.accuracy(mixing.discretised(genotype), observer, part=1)
        )
        collapse = collapse_metrics(mixing, genotype)
        if collapse["skip/normal"] > self.config.skip_limit:
            observer.on_warning(
                "collapse",
                f"the normal cell has {collapse['skip/normal']:.0f} skip connections after epoch "
                f"{self.epoch + 1}, more than {self.config.skip_limit}: the search may be "
                "collapsing; fewer epochs or another method may help",
            )
        self.mixing_history.append(mixing.operations.cpu())
        metrics = {
            "supernet/train_loss": loss,
            "supernet/train_accuracy": accuracy,
            "supernet/val_loss": fmean(losses),
            "supernet/val_accuracy": validation_accuracy,
            "supernet/discretised_accuracy": discretised,
            "supernet/discretised_gap": validation_accuracy - discretised,
            **collapse,
            AGE: self._age(genotype),
            "lr": self.learning_rate,
            "images_per_second": 2 * self.meter.images / training_seconds,
            "epoch_seconds": self.epoch_watch.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        if len(accuracies) > 1:
            for source, value in zip(self.sources.each, accuracies, strict=True):
                metrics[f"source/{source.metric}/val_accuracy"] = value
        self.method.between_epochs(self, self.epoch)
        if self.stage_epoch == self.config.epochs - 1 and self.epoch < self.epochs - 1:
            self._end_stage()
        return metrics

    def _end_stage(self) -> None:
        """Begin the next stage with the strongest operations of this one."""
        following = self.stage_number + 1
        weights = self.method.mixing(self.supernet).operations.detach()
        keep = self.config.stages[following].operations
        assert keep is not None  # fewer than before
        dropped = drop_weakest(weights, self.supernet.dropped, keep)
        self._begin(following)
        self.supernet.dropped.copy_(dropped)

    def _age(self, genotype: Genotype) -> float:
        """Epochs for which the derived cells have not changed since the alphas began to learn."""
        text = json.dumps(genotype.to_json(), sort_keys=True)
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        has_learnt = self.stage_epoch > self.config.warmup_epochs
        is_same = has_learnt and digest.equal(self.genotype_digest)
        self.genotype_digest = digest
        return self.records[-1].metrics[AGE] + 1 if is_same else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Supernet, optimisers, the cells and the mixing weights of the epochs so far."""
        history = self.mixing_history
        return {
            **with_prefix("supernet", self.supernet.state_dict()),
            **pack_optimiser("weight_optimiser", self.weight_optimiser),
            **pack_optimiser("architecture_optimiser", self.architecture_optimiser),
            "mixing_history": torch.stack(history) if history else torch.empty(0),
            "genotype_digest": self.genotype_digest,
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        if self.stage_number > 0:
            self._begin(self.stage_number)
        copy_tensors(self.supernet.state_dict(), without_prefix("supernet", tensors), "this search")
        restore_optimiser("weight_optimiser", self.weight_optimiser, tensors)
        restore_optimiser("architecture_optimiser", self.architecture_optimiser, tensors)
        self.mixing_history = list(tensors["mixing_history"])
        self.genotype_digest = tensors["genotype_digest"]

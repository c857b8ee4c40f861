"""Does a search that begins with another set's supernet get there sooner, and any further?

A cell is one search on one target: from scratch, or from the supernet of the nearest source, of a
random one, of the farthest, or of all sources together. Sources are searched when a cell first asks
for them, with the cell's method and seed, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nas.architecture import Skeleton
from nas.data import Batches, ImageTask
from nas.errors import ConfigurationError, DataError
from nas.evaluation import accuracy
from nas.observer import Observer
from nas.randomness import generator
from nas.search import BilevelSearch, SearchConfig, SearchResult, find_method
from nas.spaces import DartsSpace
from nas.spaces.darts import Genotype
from nas.study.domains import Domain, Domains
from nas.training import TrainConfig, Training
from nas.transfer.otdd import OTDDConfig, cached_distance
from nas.transfer.otdd.embedding import digest_of
from nas.transfer.supernet import WarmStart, WarmStartOptions
from nas.transfer.zoo import (
    Card,
    SourceCard,
    ZooEntry,
    file_digest,
    load_entry,
    overlap,
    save_entry,
)

SCRATCH, NEAREST, RANDOM, FARTHEST, MULTI = STARTS = (
    "scratch",
    "nearest",
    "random",
    "farthest",
    "multi",
)
FULL, REDUCED = BUDGETS = ("full", "reduced")
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Cell:
    """One search of the design; ``budget`` is its length in epochs."""

    target: Domain
    method: str
    seed: int
    start: str
    budget: str

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"{self.target.name}, {self.method}, seed {self.seed}, {self.start}, {self.budget} "
            "budget"
        )

    @property
    def is_trained(self) -> bool:
        """Whether the cells that are found are trained as a network and tested."""
        return self.start in (SCRATCH, NEAREST)


@dataclass(frozen=True)
class WarmStartStudy:
    """The design.

    Attributes:
        searches: settings of each method that is studied, by its name, at full budget.
        seeds: number of repetitions, each with sources of its own.
        reduced_epochs: of searches at reduced budget.
        multi_epochs: of the supernet of all sources; in each a step is taken for every batch of
            every source.
        side, limit: of the images; see :class:`nas.study.domains.Domains`.
        training: of the networks that are made of the cells.
    """

    targets: tuple[Domain, ...]
    sources: tuple[Domain, ...]
    searches: tuple[tuple[str, SearchConfig], ...]
    seeds: int
    reduced_epochs: int
    multi_epochs: int
    side: int
    limit: int
    training: TrainConfig

    def __post_init__(self) -> None:
        if len(self.sources) < 3 or not self.targets or set(self.sources) & set(self.targets):
            raise ConfigurationError(
                "a study of warm starts needs a target and at least 3 sources, which are other "
                f"sets, not {len(self.targets)} and {len(self.sources)}"
            )

    @property
    def digest(self) -> str:
        """12 hex digits over all that decides a cell; more seeds are the same study, longer."""
        return digest_of("warm-start study", str(asdict(replace(self, seeds=1))))[:12]

    def search(self, method: str, epochs: int | None = None) -> SearchConfig:
        """The settings of ``method``; the share of epochs in which the alphas wait stays."""
        config = dict(self.searches)[method]
        if epochs is None or epochs == config.epochs:
            return config
        waiting = min(epochs - 1, round(epochs * config.warmup_epochs / config.epochs))
        return replace(config, epochs=epochs, warmup_epochs=waiting)

    def cells(self) -> list[Cell]:
        """All of them, in an order in which every beginning is as balanced as can be.

        Seed by seed, method by method, then start by start, each on all targets; cells of reduced
        budget come last.
        """
        rounds = [(start, FULL) for start in STARTS] + [(NEAREST, REDUCED), (SCRATCH, REDUCED)]
        return [
            Cell(target, method, seed, start, budget)
            for seed in range(self.seeds)
            for method, _ in self.searches
            for start, budget in rounds
            for target in self.targets
        ]


@dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Attributes:
        sources: names of the sets behind the supernet that it began with; empty from scratch.
        distance: to the nearest of them (OTDD of pixels); nan from scratch.
        accuracies: of the supernet on the validation half (0..1) after each epoch.
        seconds: that each epoch took, with its validation.
        test_accuracy: of the trained network (0..1); nan where none is trained.
        train_seconds: that its training took; nan likewise.
    """

    sources: tuple[str, ...]
    distance: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    genotype: Genotype
    test_accuracy: float
    train_seconds: float


class Laboratory:
    """Runs cells: every outcome is a pure function of the study, its cell and the archives.

    Args:
        root: where the archives of images lie.
        folder: where supernets of sources and distances are kept from one process to the next.
    """

    def __init__(
        self,
        study: WarmStartStudy,
        root: Path,
        folder: Path,
        *,
        device: torch.device,
        backend: str,
    ) -> None:
        self.study = study
        self.domains = Domains(root, study.side, study.limit)
        self._folder, self._device, self._backend = folder, device, backend
        self._distances: dict[tuple[Domain, Domain], float] = {}

    def run(self, cell: Cell, observer: Observer | None = None) -> Outcome:
        """Search, and train and test what was found where the design asks for that."""
        task = self.domains[cell.target].task
        config = self.study.search(
            cell.method, self.study.reduced_epochs if cell.budget == REDUCED else None
        )
        sources, how_far = self.sources(cell)
        start = self._warm_start(sources, cell.method, cell.seed) if sources else None
        found = self._search([task], cell.method, config, cell.seed, start, observer)
        tested, seconds = math.nan, math.nan
        if cell.is_trained:
            tested, seconds = self._train(task, found.genotype, config, cell.seed)
        return Outcome(
            sources=tuple(source.name for source in sources),
            distance=how_far,
            accuracies=tuple(r.metrics["supernet/val_accuracy"] for r in found.records),
            seconds=tuple(r.metrics["epoch_seconds"] for r in found.records),
            genotype=found.genotype,
            test_accuracy=tested,
            train_seconds=seconds,
        )

    def sources(self, cell: Cell) -> tuple[tuple[Domain, ...], float]:
        """What ``cell`` begins with, and how far that is; none and nan from scratch.

        A random source is neither the nearest nor the farthest. All sources together are as far as
        the nearest of them.
        """
        if cell.start == SCRATCH:
            return (), math.nan
        ranked = sorted(self.study.sources, key=lambda source: self.distance(source, cell.target))
        nearest = self.distance(ranked[0], cell.target)
        if cell.start == MULTI:
            return tuple(self.study.sources), nearest
        draw = generator(cell.seed, "study/random", cell.target.name, cell.method)
        between = 1 + int(torch.randint(len(ranked) - 2, (1,), generator=draw))
        chosen = ranked[{NEAREST: 0, RANDOM: between, FARTHEST: -1}[cell.start]]
        return (chosen,), self.distance(chosen, cell.target)

    def distance(self, source: Domain, target: Domain) -> float:
        """OTDD of the two by raw pixels.

        Raises:
            DataError: they share an image.
        """
        if (source, target) not in self._distances:
            own, other = self.domains[target], self.domains[source]
            if shared := overlap(own.hashes, other.hashes):
                raise DataError(
                    f"{shared:.1%} of the images of {target.name} are in {source.name}: a target "
                    "shares none with a source"
                )
            self._distances[source, target] = cached_distance(
                other.sketch, own.sketch, OTDDConfig(), self._folder / "distances"
            )
        return self._distances[source, target]

    def _warm_start(self, sources: Sequence[Domain], method: str, seed: int) -> WarmStart:
        path = self._supernet(sources, method, seed)
        return WarmStart(load_entry(path).supernet, file_digest(path), WarmStartOptions())

    def _supernet(self, sources: Sequence[Domain], method: str, seed: int) -> Path:
        """The file of the supernet of ``sources``, searched if it is not there yet."""
        name = sources[0].name if len(sources) == 1 else f"{len(sources)}-sets"
        path = self._folder / f"{self.study.digest}-{method}-{seed}-{name}.safetensors"
        if not path.is_file():
            tasks = [self.domains[source].task for source in sources]
            epochs = self.study.multi_epochs if len(sources) > 1 else None
            found = self._search(tasks, method, self.study.search(method, epochs), seed)
            card = Card(
                method,
                seed,
                tuple(SourceCard.of(task) for task in tasks),
                tuple(r.metrics["supernet/val_accuracy"] for r in found.records),
                found.seconds,
            )
            hashes = torch.cat([self.domains[source].hashes for source in sources]).unique()
            save_entry(path, ZooEntry(found.supernet, card, hashes))
        return path

    def _search(
        self,
        tasks: Sequence[ImageTask],
        method: str,
        config: SearchConfig,
        seed: int,
        start: WarmStart | None = None,
        observer: Observer | None = None,
    ) -> SearchResult:
        search = BilevelSearch(
            tasks,
            find_method(method),
            config,
            seed=seed,
            device=self._device,
            backend=self._backend,
            start=start,
        )
        return search.run(observer=observer)

    def _train(
        self, task: ImageTask, genotype: Genotype, config: SearchConfig, seed: int
    ) -> tuple[float, float]:
        """Test accuracy of a network of these cells, as large as the supernet, and its seconds."""
        skeleton = Skeleton("cifar", config.supernet.channels, config.supernet.cells)
        architecture = DartsSpace().from_genotype(genotype, skeleton)
        training = Training(task, architecture, self.study.training, seed=seed, device=self._device)
        trained = training.run()
        batches = Batches(
            task,
            task.splits.test,
            EVALUATION_BATCH,
            seed=seed,
            stream="test",
            device=self._device,
        )
        return accuracy(trained.network, batches.epoch()).accuracy, trained.seconds

"""Does a search that begins with another set's supernet get there sooner, and any further?

A cell is one search on one target: from scratch, or from the supernet of the nearest source, of a
random one, of the farthest, or of all sources together. Its length in epochs is a budget, over
which its learning rate falls: what a shorter search reaches is seen by running a shorter search, as
accuracy at a high learning rate says little. Sources are searched when a cell first asks for them,
by the cell's method, and kept for all seeds.
"""

from __future__ import annotations

import math
import time
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
from nas.study.domains import Domain, Domains, Families
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
EVALUATION_BATCH = 256
TEST_FRACTION = 0.4  # of targets: the test split costs little, and small ones drown differences
SOURCE_TEST_FRACTION = 0.1  # nobody tests on sources
SOURCE_SEED = 0


@dataclass(frozen=True)
class Cell:
    """One search of the design, of so many epochs."""

    target: Domain
    method: str
    seed: int
    start: str
    epochs: int

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"{self.target.name}, {self.method}, seed {self.seed}, {self.start}, "
            f"{self.epochs} epochs"
        )


@dataclass(frozen=True)
class WarmStartStudy:
    """The design.

    Attributes:
        searches: settings of each method that is studied, by its name; their epochs are those of
            the searches from scratch.
        seeds: number of repetitions on the targets; sources are searched once.
        budgets: epochs of the searches with a warm start, rising.
        reduced_epochs: the budget whose cells are trained, too; from scratch it runs as well.
        limit: images of a target at most; ``source_limit`` of a source.
        source_epochs: of the supernets of single sources.
        multi_epochs: of the supernet of all sources; in each a step is taken for every batch of
            every source.
        side: of all images, in pixels.
        training: of the networks that are made of the cells.
    """

    targets: tuple[Domain, ...]
    sources: tuple[Domain, ...]
    searches: tuple[tuple[str, SearchConfig], ...]
    seeds: int
    budgets: tuple[int, ...]
    reduced_epochs: int
    limit: int
    source_limit: int
    source_epochs: int
    multi_epochs: int
    side: int
    training: TrainConfig

    def __post_init__(self) -> None:
        if len(self.sources) < 3 or not self.targets or set(self.sources) & set(self.targets):
            raise ConfigurationError(
                "a study of warm starts needs a target and at least 3 sources, which are other "
                f"sets, not {len(self.targets)} and {len(self.sources)}"
            )
        lengths = {config.epochs for _, config in self.searches}
        rising = self.budgets == tuple(sorted(set(self.budgets)))
        if len(lengths) != 1 or not rising or self.reduced_epochs not in self.budgets:
            raise ConfigurationError(
                "a study's searches from scratch are equally long, and the budgets of its warm "
                f"ones rise and include the reduced one, which is not so with {sorted(lengths)}, "
                f"{self.budgets} and {self.reduced_epochs}"
            )
        if self.budgets[-1] >= self.full_epochs:
            raise ConfigurationError(
                f"a warm search of {self.budgets[-1]} epochs is not shorter than one from scratch "
                f"of {self.full_epochs}"
            )

    @property
    def digest(self) -> str:
        """12 hex digits over all that decides a cell; more seeds are the same study, longer."""
        return digest_of("warm-start study", str(asdict(replace(self, seeds=1))))[:12]

    @property
    def full_epochs(self) -> int:
        """Of the searches from scratch, the same for every method."""
        return self.searches[0][1].epochs

    def search(self, method: str, epochs: int) -> SearchConfig:
        """The settings of ``method``; the share of epochs in which the alphas wait stays."""
        config = dict(self.searches)[method]
        waiting = min(epochs - 1, round(epochs * config.warmup_epochs / config.epochs))
        return replace(config, epochs=epochs, warmup_epochs=waiting)

    def cells(self) -> list[Cell]:
        """All of them; what decides most comes first.

        Seed by seed, method by method, then search by search, each on all targets.
        """
        full, reduced = self.full_epochs, self.reduced_epochs
        rounds = [(SCRATCH, full), (NEAREST, reduced), (MULTI, reduced)]
        rounds += [(start, e) for start in (NEAREST, MULTI) for e in self.budgets if e != reduced]
        rounds += [(NEAREST, full), (SCRATCH, reduced)]
        rounds += [(start, epochs) for start in (RANDOM, FARTHEST) for epochs in self.budgets]
        return [
            Cell(target, method, seed, start, epochs)
            for seed in range(self.seeds)
            for method, _ in self.searches
            for start, epochs in rounds
            for target in self.targets
        ]

    def is_trained(self, cell: Cell) -> bool:
        """Whether the genotype that ``cell`` finds is trained as a network and tested."""
        return (
            cell.start in (SCRATCH, NEAREST)
            and cell.epochs in (self.full_epochs, self.reduced_epochs)
        ) or (cell.start == MULTI and cell.epochs == self.reduced_epochs)


@dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Attributes:
        sources: names of the sets behind the supernet that it began with; empty from scratch.
        distance: to the nearest of them (OTDD of pixels); nan from scratch.
        accuracies: of the supernet on the validation half (0..1) after each epoch.
        seconds: that each epoch took, with its validation.
        processor_seconds: of the search, whatever else ran on the machine.
        test_accuracy: of the trained network (0..1); nan where none is trained.
        train_seconds: that its training took; nan likewise.
    """

    sources: tuple[str, ...]
    distance: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    processor_seconds: float
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
        families = Families(root)
        self.targets = Domains(families, study.side, study.limit, TEST_FRACTION)
        self.sources = Domains(families, study.side, study.source_limit, SOURCE_TEST_FRACTION)
        self._folder, self._device, self._backend = folder, device, backend
        self._distances: dict[tuple[Domain, Domain], float] = {}

    def run(self, cell: Cell, observer: Observer | None = None) -> Outcome:
        """Search, and train and test what was found where the design asks for that."""
        task = self.targets[cell.target].task
        config = self.study.search(cell.method, cell.epochs)
        sources, how_far = self.beginning(cell)
        start = self._warm_start(sources, cell.method) if sources else None
        before = time.process_time()
        found = self._search([task], cell.method, config, cell.seed, start, observer)
        processor_seconds = time.process_time() - before
        tested, seconds = math.nan, math.nan
        if self.study.is_trained(cell):
            tested, seconds = self._train(task, found.genotype, config, cell.seed)
        return Outcome(
            sources=tuple(source.name for source in sources),
            distance=how_far,
            accuracies=tuple(r.metrics["supernet/val_accuracy"] for r in found.records),
            seconds=tuple(r.metrics["epoch_seconds"] for r in found.records),
            processor_seconds=processor_seconds,
            genotype=found.genotype,
            test_accuracy=tested,
            train_seconds=seconds,
        )

    def beginning(self, cell: Cell) -> tuple[tuple[Domain, ...], float]:
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
            own, other = self.targets[target], self.sources[source]
            if shared := overlap(own.hashes, other.hashes):
                raise DataError(
                    f"{shared:.1%} of the images of {target.name} are in {source.name}: a target "
                    "shares none with a source"
                )
            self._distances[source, target] = cached_distance(
                other.sketch, own.sketch, OTDDConfig(), self._folder / "distances"
            )
        return self._distances[source, target]

    def _warm_start(self, sources: Sequence[Domain], method: str) -> WarmStart:
        path = self._supernet(sources, method)
        return WarmStart(load_entry(path).supernet, file_digest(path), WarmStartOptions())

    def _supernet(self, sources: Sequence[Domain], method: str) -> Path:
        """The file of the supernet of ``sources``, searched if it is not there yet."""
        name = sources[0].name if len(sources) == 1 else f"{len(sources)}-sets"
        path = self._folder / f"{self.study.digest}-{method}-{name}.safetensors"
        if not path.is_file():
            tasks = [self.sources[source].task for source in sources]
            single = len(sources) == 1
            epochs = self.study.source_epochs if single else self.study.multi_epochs
            found = self._search(tasks, method, self.study.search(method, epochs), SOURCE_SEED)
            card = Card(
                method,
                SOURCE_SEED,
                tuple(SourceCard.of(task) for task in tasks),
                tuple(r.metrics["supernet/val_accuracy"] for r in found.records),
                found.seconds,
            )
            hashes = torch.cat([self.sources[source].hashes for source in sources]).unique()
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

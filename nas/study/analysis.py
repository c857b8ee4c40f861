"""What the rows of a warm-start study say, from the file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

import numpy as np

from nas.errors import DataError
from nas.spaces.darts import Genotype
from nas.statistics import Interval, proportion_interval, spearman
from nas.study.warm_start import SCRATCH, Cell, Outcome, WarmStartStudy

STUDY = "study"  # the column by which rows of other settings are recognised
_SERIES = ("accuracies", "seconds")  # numbers of each epoch, separated by spaces
_DECIMALS = {"accuracies": 6, "seconds": 3}


@dataclass(frozen=True)
class Row:
    """One cell and what it came to; see :class:`nas.study.warm_start.Cell` and ``Outcome``.

    ``source`` is empty and ``distance`` nan for a search from scratch; ``test_accuracy`` and
    ``train_seconds`` are nan where no network was trained.
    """

    study: str
    target: str
    method: str
    seed: int
    start: str
    epochs: int
    source: str
    distance: float
    final_accuracy: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    processor_seconds: float
    test_accuracy: float
    train_seconds: float
    genotype: str  # JSON
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """Names the cell."""
        return self.target, self.method, str(self.seed), self.start, str(self.epochs)

    @property
    def block(self) -> tuple[str, str, int]:
        """What a search from scratch and its rivals share."""
        return self.target, self.method, self.seed

    @property
    def summary(self) -> str:
        """For people."""
        tested = "" if math.isnan(self.test_accuracy) else f", tested {self.test_accuracy:.1%}"
        began = f" from {self.source} at {self.distance:.2f}" if self.source else ""
        return (
            f"{self.final_accuracy:.1%} after {self.epochs} epochs and "
            f"{self.processor_seconds:.0f} s of a processor{began}{tested}"
        )

    @staticmethod
    def of(study: WarmStartStudy, cell: Cell, outcome: Outcome, device: str) -> Row:
        """The row of a cell that has just been run."""
        return Row(
            study=study.digest,
            target=cell.target.name,
            method=cell.method,
            seed=cell.seed,
            start=cell.start,
            epochs=cell.epochs,
            source="+".join(outcome.sources),
            distance=outcome.distance,
            final_accuracy=outcome.accuracies[-1],
            accuracies=outcome.accuracies,
            seconds=outcome.seconds,
            processor_seconds=outcome.processor_seconds,
            test_accuracy=outcome.test_accuracy,
            train_seconds=outcome.train_seconds,
            genotype=json.dumps(outcome.genotype.to_json(), separators=(",", ":")),
            device=device,
        )

    def write(self) -> dict[str, str]:
        """As text; what is nan is empty."""
        return {name: _text(name, getattr(self, name)) for name in COLUMNS}

    @staticmethod
    def read(row: Mapping[str, str]) -> Row:
        """What :meth:`write` gave.

        Raises:
            DataError: a column is missing or is not what it should be.
        """
        try:
            values: dict[str, object] = {}
            for field in fields(Row):
                text = row[field.name]
                if field.name in _SERIES:
                    values[field.name] = tuple(map(float, text.split()))
                elif field.type == "float":
                    values[field.name] = float(text) if text else math.nan
                else:
                    values[field.name] = int(text) if field.type == "int" else text
            Genotype.from_json(json.loads(row["genotype"]))
            return Row(**values)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is no row of a warm-start study: {error}") from error


COLUMNS = tuple(field.name for field in fields(Row))


def _text(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{number:.{_DECIMALS[name]}f}" for number in value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return str(value)


@dataclass(frozen=True)
class Race:
    """Searches with a warm start beside the one from scratch of the same target, method and seed.

    Attributes:
        scratch: the whole search from scratch.
        warm: searches with one kind of warm start, from the shortest budget to the longest.
    """

    scratch: Row
    warm: tuple[Row, ...]

    @property
    def start(self) -> str:
        """The kind of warm start."""
        return self.warm[0].start

    @property
    def goal(self) -> float:
        """The validation accuracy that the search from scratch ends with."""
        return self.scratch.final_accuracy

    @property
    def winner(self) -> Row | None:
        """The shortest warm search that ends with the goal or more; None where none does."""
        return next((row for row in self.warm if row.final_accuracy >= self.goal), None)

    @property
    def speed_up(self) -> float:
        """Epochs of the search from scratch over those of the winner; 0 without one.

        0 keeps medians and ranks right, as long as less than half of the races are such.
        """
        return self._over(self.scratch.epochs)

    @property
    def speed_up_from_first_touch(self) -> float:
        """The same, had the search from scratch ended when it first had the goal.

        It could not have known: its learning rate was still to fall. A lower bound.
        """
        return self._over(self.first_touch)

    @property
    def first_touch(self) -> int:
        """Epochs after which the search from scratch had the goal for the first time."""
        accuracies = enumerate(self.scratch.accuracies, start=1)
        return next(epoch for epoch, accuracy in accuracies if accuracy >= self.goal)

    @property
    def speed_up_in_seconds(self) -> float:
        """The same as ``speed_up`` in seconds of a processor; 0 without a winner."""
        if self.winner is None:
            return 0.0
        return self.scratch.processor_seconds / self.winner.processor_seconds

    def _over(self, epochs: int) -> float:
        return epochs / self.winner.epochs if self.winner else 0.0


def races(rows: Sequence[Row], budgets: Sequence[int], full_epochs: int) -> list[Race]:
    """Every warm start whose search from scratch and whose searches of all ``budgets`` are there.

    Args:
        full_epochs: of the search from scratch.
    """
    by_key = {(row.block, row.start, row.epochs): row for row in rows}
    found = []
    for block, start in dict.fromkeys((row.block, row.start) for row in rows):
        own = by_key.get((block, SCRATCH, full_epochs))
        warm = tuple(by_key[block, start, e] for e in budgets if (block, start, e) in by_key)
        if start != SCRATCH and own is not None and len(warm) == len(budgets):
            found.append(Race(own, warm))
    return found


def matched(
    rows: Sequence[Row], first: tuple[str, int], second: tuple[str, int]
) -> list[tuple[Row, Row]]:
    """Rows of two (start, epochs) with the same target, method and seed, side by side."""
    own = {row.block: row for row in rows if (row.start, row.epochs) == first}
    other = {row.block: row for row in rows if (row.start, row.epochs) == second}
    return [(row, other[block]) for block, row in own.items() if block in other]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (linear between values); nan without any."""
    if not values:
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class SpeedUps:
    """How races ended.

    Attributes:
        races: number of them; ``reached`` of them got to the goal at all.
        quartiles: of the speed-up in epochs, lower, median and upper.
        lowest, highest: of the same.
        in_seconds: median speed-up in seconds of a processor.
        from_first_touch: median of the lower bound in epochs.
        fourfold: share with a speed-up of at least 4, with Wilson's 95% interval.
    """

    races: int
    reached: int
    quartiles: tuple[float, float, float]
    lowest: float
    highest: float
    in_seconds: float
    from_first_touch: float
    fourfold: Interval


def speed_ups(found: Sequence[Race]) -> SpeedUps:
    """Sum up one or more races."""
    values = [race.speed_up for race in found]
    return SpeedUps(
        races=len(found),
        reached=sum(race.winner is not None for race in found),
        quartiles=quartiles(values),
        lowest=min(values),
        highest=max(values),
        in_seconds=quartiles([race.speed_up_in_seconds for race in found])[1],
        from_first_touch=quartiles([race.speed_up_from_first_touch for race in found])[1],
        fourfold=proportion_interval(sum(value >= 4 for value in values), len(values)),
    )


def gains(
    rows: Sequence[Row], start: str, epochs: int, full_epochs: int
) -> list[tuple[Row, float]]:
    """Warm searches of that start and length; final accuracy less that of the one from scratch."""
    return [
        (warm, warm.final_accuracy - scratch.final_accuracy)
        for warm, scratch in matched(rows, (start, epochs), (SCRATCH, full_epochs))
    ]


def distance_correlation(worth: Sequence[tuple[Row, float]]) -> tuple[float, float]:
    """Spearman's correlation of distance with what it was worth: over all, and within blocks.

    The second is the mean over targets, methods and seeds of the correlation among their own
    sources: a target that is far from everything cannot feign it. nan where there are too few.

    Args:
        worth: warm searches from a single source, each with a number.
    """

    def correlation(some: Sequence[tuple[Row, float]]) -> float:
        if len(some) < 3:
            return math.nan
        return spearman([row.distance for row, _ in some], [value for _, value in some])

    blocks: dict[tuple[str, str, int], list[tuple[Row, float]]] = {}
    for row, value in worth:
        blocks.setdefault(row.block, []).append((row, value))
    within = [correlation(block) for block in blocks.values()]
    known = [value for value in within if not math.isnan(value)]
    return correlation(worth), fmean(known) if known else math.nan

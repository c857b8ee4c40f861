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
from nas.study.warm_start import (
    FARTHEST,
    FULL,
    NEAREST,
    RANDOM,
    SCRATCH,
    Cell,
    Outcome,
    WarmStartStudy,
)

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
    budget: str
    source: str
    distance: float
    final_accuracy: float
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    test_accuracy: float
    train_seconds: float
    genotype: str  # JSON
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """Names the cell."""
        return self.target, self.method, str(self.seed), self.start, self.budget

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
            f"{self.final_accuracy:.1%} after {len(self.accuracies)} epochs and "
            f"{sum(self.seconds):.0f} s{began}{tested}"
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
            budget=cell.budget,
            source="+".join(outcome.sources),
            distance=outcome.distance,
            final_accuracy=outcome.accuracies[-1],
            accuracies=outcome.accuracies,
            seconds=outcome.seconds,
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
    """A search with a warm start beside the one from scratch of the same target, method and seed.

    Attributes:
        goal: the validation accuracy that the search from scratch ended with.
        scratch_epochs, warm_epochs: until each had reached the goal for the first time; the second
            is None where it never did.
        scratch_seconds, warm_seconds: likewise.
    """

    warm: Row
    scratch: Row
    goal: float
    scratch_epochs: int
    warm_epochs: int | None

    @property
    def speed_up(self) -> float:
        """Epochs from scratch over epochs with the warm start; 0 where it never reached the goal.

        0 keeps medians and ranks right, as long as less than half of the races are such.
        """
        return self.scratch_epochs / self.warm_epochs if self.warm_epochs else 0.0

    @property
    def speed_up_in_seconds(self) -> float:
        """The same of seconds, as they were on that machine."""
        if self.warm_epochs is None:
            return 0.0
        warm = sum(self.warm.seconds[: self.warm_epochs])
        return sum(self.scratch.seconds[: self.scratch_epochs]) / warm


def epochs_until(accuracies: Sequence[float], goal: float) -> int | None:
    """The first epoch, from 1, after which ``goal`` was reached; None where it never was."""
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy >= goal:
            return epoch
    return None


def races(rows: Sequence[Row]) -> list[Race]:
    """Every warm start at full budget whose search from scratch is there, too."""
    scratch = {row.block: row for row in rows if row.start == SCRATCH and row.budget == FULL}
    found = []
    for row in rows:
        if row.start == SCRATCH or row.budget != FULL or row.block not in scratch:
            continue
        own = scratch[row.block]
        goal = own.accuracies[-1]
        reached = epochs_until(own.accuracies, goal)
        assert reached is not None  # at its last epoch at the latest
        found.append(Race(row, own, goal, reached, epochs_until(row.accuracies, goal)))
    return found


def matched(
    rows: Sequence[Row], first: tuple[str, str], second: tuple[str, str]
) -> list[tuple[Row, Row]]:
    """Rows of two (start, budget) with the same target, method and seed, side by side."""
    own = {row.block: row for row in rows if (row.start, row.budget) == first}
    other = {row.block: row for row in rows if (row.start, row.budget) == second}
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
        in_seconds: median speed-up in seconds.
        faster: share with a speed-up above 1, with Wilson's 95% interval.
    """

    races: int
    reached: int
    quartiles: tuple[float, float, float]
    lowest: float
    highest: float
    in_seconds: float
    faster: Interval


def speed_ups(found: Sequence[Race]) -> SpeedUps:
    """Sum up one or more races."""
    values = [race.speed_up for race in found]
    return SpeedUps(
        races=len(found),
        reached=sum(race.warm_epochs is not None for race in found),
        quartiles=quartiles(values),
        lowest=min(values),
        highest=max(values),
        in_seconds=quartiles([race.speed_up_in_seconds for race in found])[1],
        faster=proportion_interval(sum(value > 1 for value in values), len(values)),
    )


def distance_correlation(found: Sequence[Race]) -> tuple[float, float]:
    """Spearman's correlation of distance with speed-up: over all races, and within blocks.

    The second is the mean over targets, methods and seeds of the correlation among their own
    sources: a target that is far from everything cannot feign it. Races from one source only; nan
    where there are too few.
    """
    single = [race for race in found if race.warm.start in (NEAREST, RANDOM, FARTHEST)]
    if len(single) < 3:
        return math.nan, math.nan
    over_all = spearman([r.warm.distance for r in single], [r.speed_up for r in single])
    blocks: dict[tuple[str, str, int], list[Race]] = {}
    for race in single:
        blocks.setdefault(race.warm.block, []).append(race)
    within = [
        spearman([r.warm.distance for r in block], [r.speed_up for r in block])
        for block in blocks.values()
        if len(block) == 3
    ]
    known = [value for value in within if not math.isnan(value)]
    return over_all, fmean(known) if known else math.nan

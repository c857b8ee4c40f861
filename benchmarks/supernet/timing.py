"""Fair times: implementations take turns, and a second core is believed only when it is seen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Turn = Callable[[], Mapping[str, float]]  # does each phase once; milliseconds by phase


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        warmups: rounds before the first that counts.
        repetitions: samples wanted of each implementation.
        least: samples that a slow one gets at least, also when its time is up.
        seconds: time for the samples of one implementation.
        patience: where samples cannot be trusted, try so many times as often.
    """

    warmups: int = 2
    repetitions: int = 9
    least: int = 5
    seconds: float = 120.0
    patience: int = 3


@dataclass(frozen=True)
class Sample:
    """The milliseconds of one turn by phase, and whether the machine was whole around it."""

    milliseconds: Mapping[str, float]
    trusted: bool


@dataclass(frozen=True)
class Spread:
    """Milliseconds of one phase over ``count`` samples."""

    median: float
    min: float
    max: float
    count: int
    trusted: bool


def take_turns(
    turns: Mapping[str, Turn],
    budget: Budget,
    probe: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Sample]]:
    """Samples of every implementation, one turn each a round.

    ``probe`` says whether the machine is whole; it runs between any two turns. A sample whose
    probe before or after it failed is not trusted, and is taken again as patience allows.
    """
    for _ in range(budget.warmups):
        for turn in turns.values():
            turn()
    samples: dict[str, list[Sample]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    whole = probe is None or probe()
    open_turns = list(turns)
    while open_turns:
        for name in open_turns:
            start = clock()
            milliseconds = turns[name]()
            spent[name] += clock() - start
            before, whole = whole, probe is None or probe()
            samples[name].append(Sample(milliseconds, before and whole))
        open_turns = [name for name in open_turns if _wants(samples[name], spent[name], budget)]
    return samples


def _wants(samples: list[Sample], spent: float, budget: Budget) -> bool:
    """Whether an implementation needs another turn."""
    trusted = sum(sample.trusted for sample in samples)
    enough = trusted >= budget.repetitions or (trusted >= budget.least and spent >= budget.seconds)
    hopeless = len(samples) >= budget.patience * budget.repetitions or (
        len(samples) >= budget.patience * budget.least and spent >= budget.patience * budget.seconds
    )
    return not (enough or hopeless)


def summarise(samples: list[Sample], phase: str, least: int) -> Spread:
    """Median and range of the trusted samples, or of all where fewer than ``least`` are."""
    trusted = [sample for sample in samples if sample.trusted]
    believed = len(trusted) >= least
    times = [sample.milliseconds[phase] for sample in (trusted if believed else samples)]
    return Spread(statistics.median(times), min(times), max(times), len(times), believed)

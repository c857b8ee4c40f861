"""The analysis of hand-made rows gives the numbers computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nas.errors import DataError
from nas.spaces.darts import PUBLISHED
from nas.study.analysis import (
    Race,
    Row,
    distance_correlation,
    gains,
    matched,
    quartiles,
    races,
    speed_ups,
)

GENOTYPE = json.dumps(PUBLISHED["DARTS_V2"].to_json())


def row(target: str, start: str, accuracies: str, **changes: object) -> Row:
    values = tuple(map(float, accuracies.split()))
    plain = Row(
        study="s",
        target=target,
        method="darts",
        seed=0,
        start=start,
        epochs=len(values),
        source="" if start == "scratch" else f"{start} set",
        distance=math.nan,
        final_accuracy=values[-1],
        accuracies=values,
        seconds=(9.0,) * len(values),
        processor_seconds=2.0 * len(values),
        test_accuracy=math.nan,
        train_seconds=math.nan,
        genotype=GENOTYPE,
        device="cpu",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# From scratch 4 epochs; a ends with 0.6, which it has first after 3; b with 0.8, after 4.
ROWS = [
    row("a", "scratch", "0.2 0.4 0.7 0.6"),
    row("b", "scratch", "0.2 0.4 0.6 0.8"),
    row("a", "nearest", "0.6", distance=1.0, processor_seconds=1.0),  # reaches it: 4 / 1
    row("a", "nearest", "0.6 0.7", distance=1.0),
    row("b", "nearest", "0.4", distance=2.0),
    row("b", "nearest", "0.9 0.8", distance=2.0),  # 4 / 2
    row("a", "farthest", "0.1", distance=5.0),
    row("a", "farthest", "0.7 0.4", distance=5.0),  # never: what counts is how it ends
    row("b", "farthest", "0.7", distance=4.0),
    row("b", "farthest", "0.8 0.9", distance=4.0),  # 4 / 2
    row("a", "random", "0.1", distance=3.0),
    row("a", "random", "0.1 0.6", distance=3.0),  # 4 / 2
    row("b", "random", "0.1", distance=3.0),  # not all of its budgets
    row("c", "nearest", "0.9"),  # nothing to race against
    row("c", "nearest", "0.9 0.9"),
    row("a", "nearest", "0.9 0.9 0.9 0.9"),  # no budget of a race
]


def all_races() -> list[Race]:
    return races(ROWS, (1, 2), 4)


def test_races() -> None:
    found = {(race.scratch.target, race.start): race for race in all_races()}
    assert {key: race.speed_up for key, race in found.items()} == {
        ("a", "nearest"): 4,
        ("b", "nearest"): 2,
        ("a", "farthest"): 0,
        ("b", "farthest"): 2,
        ("a", "random"): 2,
    }
    assert found["a", "nearest"].goal == 0.6
    assert found["a", "nearest"].speed_up_in_seconds == 8  # 8 s of a processor over 1
    assert found["a", "nearest"].speed_up_from_first_touch == 3
    assert found["b", "nearest"].speed_up_from_first_touch == 2
    assert found["a", "farthest"].winner is None
    assert found["a", "farthest"].speed_up_in_seconds == 0
    assert found["a", "farthest"].speed_up_from_first_touch == 0


def test_speed_ups() -> None:
    summary = speed_ups(all_races())
    assert summary.races == 5
    assert summary.reached == 4
    assert summary.quartiles == (2, 2, 2)
    assert (summary.lowest, summary.highest) == (0, 4)
    assert summary.fourfold.mean == 1 / 5
    assert summary.in_seconds == 2
    assert summary.from_first_touch == 2  # of 3, 2, 0, 2 and 1.5


def test_quartiles_of_nothing() -> None:
    assert all(map(math.isnan, quartiles([])))


def test_distance_correlation() -> None:
    # distances 1 2 5 4 3 and speed-ups 4 2 0 2 2 have ranks 1 2 5 4 3 and 5 3 1 3 3: products of
    # deviations -4 0 -4 0 0, over the root of 10 * 8. Only a has all three, and there distances
    # 1 5 3 and speed-ups 4 0 2 run against each other.
    worth = [(race.warm[0], race.speed_up) for race in all_races()]
    over_all, within = distance_correlation(worth)
    assert over_all == pytest.approx(-8 / 80**0.5)
    assert within == pytest.approx(-1)


def test_gains() -> None:
    found = {row.target: gain for row, gain in gains(ROWS, "nearest", 2, 4)}
    assert found == {"a": pytest.approx(0.1), "b": pytest.approx(0.0)}
    assert [row.target for row, _ in gains(ROWS, "random", 1, 4)] == ["a", "b"]


def test_matched() -> None:
    pairs = matched(ROWS, ("nearest", 2), ("farthest", 2))
    assert [(own.target, other.start) for own, other in pairs] == [
        ("a", "farthest"),
        ("b", "farthest"),
    ]


def test_a_row_comes_back_from_text() -> None:
    written = ROWS[3].write()
    assert written["accuracies"] == "0.600000 0.700000"
    assert written["test_accuracy"] == ""
    again = Row.read(written)
    assert math.isnan(again.test_accuracy)
    assert again.write() == written
    assert (again.key, again.seconds) == (ROWS[3].key, ROWS[3].seconds)


@pytest.mark.parametrize("change", [{"seed": "x"}, {"accuracies": "1 y"}, {"genotype": "{"}])
def test_a_broken_row_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no row of a warm-start study"):
        Row.read({**ROWS[0].write(), **change})

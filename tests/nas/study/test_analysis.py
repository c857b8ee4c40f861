"""The analysis of hand-made rows gives the numbers computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nas.errors import DataError
from nas.spaces.darts import PUBLISHED
from nas.study.analysis import (
    Row,
    distance_correlation,
    epochs_until,
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
        budget="full",
        source="" if start == "scratch" else f"{start} set",
        distance=math.nan,
        final_accuracy=values[-1],
        accuracies=values,
        seconds=(2.0,) * len(values),
        test_accuracy=math.nan,
        train_seconds=math.nan,
        genotype=GENOTYPE,
        device="cpu",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# From scratch, a ends with 0.6, which it has first after 3 epochs; b with 0.8, after 4.
ROWS = [
    row("a", "scratch", "0.2 0.4 0.7 0.6"),
    row("b", "scratch", "0.2 0.4 0.6 0.8"),
    row("a", "nearest", "0.6 0.5 0.5 0.9", distance=1.0, seconds=(1.0,) * 4),  # 3 / 1
    row("b", "nearest", "0.4 0.8 0.8 0.8", distance=2.0),  # 4 / 2
    row("a", "farthest", "0.1 0.2 0.3 0.4", distance=5.0),  # never
    row("b", "farthest", "0.1 0.2 0.8 0.9", distance=4.0),  # 4 / 3
    row("a", "random", "0.1 0.2 0.6 0.6", distance=3.0),  # 3 / 3
    row("c", "nearest", "0.9 0.9 0.9 0.9"),  # nothing to race against
    row("a", "nearest", "0.9", budget="reduced"),
]


def test_epochs_until() -> None:
    assert epochs_until([0.1, 0.5, 0.4], 0.5) == 2
    assert epochs_until([0.1, 0.5, 0.4], 0.6) is None


def test_races() -> None:
    found = {(race.warm.target, race.warm.start): race for race in races(ROWS)}
    assert {key: race.speed_up for key, race in found.items()} == {
        ("a", "nearest"): 3,
        ("b", "nearest"): 2,
        ("a", "farthest"): 0,
        ("b", "farthest"): 4 / 3,
        ("a", "random"): 1,
    }
    assert found["a", "nearest"].speed_up_in_seconds == 6.0  # 3 epochs of 2 s over one of 1 s
    assert found["a", "farthest"].warm_epochs is None
    assert found["a", "farthest"].speed_up_in_seconds == 0


def test_speed_ups() -> None:
    summary = speed_ups(races(ROWS))
    assert summary.races == 5
    assert summary.reached == 4
    assert summary.quartiles == (1, pytest.approx(4 / 3), 2)
    assert (summary.lowest, summary.highest) == (0, 3)
    assert summary.faster.mean == 3 / 5


def test_quartiles_of_nothing() -> None:
    assert all(map(math.isnan, quartiles([])))


def test_distance_correlation() -> None:
    # distances 1 2 5 4 3 and speed-ups 3 2 0 4/3 1 have ranks 1 2 5 4 3 and 5 4 1 3 2: with
    # differences -4 -2 4 1 1 that is 1 - 6 * 38 / (5 * 24). Only a has all three, and there
    # distances 1 5 3 and speed-ups 3 0 1 run against each other.
    over_all, within = distance_correlation(races(ROWS))
    assert over_all == pytest.approx(1 - 6 * 38 / 120)
    assert within == pytest.approx(-1)


def test_matched() -> None:
    pairs = matched(ROWS, ("nearest", "full"), ("farthest", "full"))
    assert [(own.target, other.start) for own, other in pairs] == [
        ("a", "farthest"),
        ("b", "farthest"),
    ]


def test_a_row_comes_back_from_text() -> None:
    written = ROWS[2].write()
    assert written["accuracies"] == "0.600000 0.500000 0.500000 0.900000"
    assert written["test_accuracy"] == ""
    again = Row.read(written)
    assert math.isnan(again.test_accuracy)
    assert again.write() == written
    assert (again.key, again.seconds) == (ROWS[2].key, ROWS[2].seconds)


@pytest.mark.parametrize("change", [{"seed": "x"}, {"accuracies": "1 y"}, {"genotype": "{"}])
def test_a_broken_row_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no row of a warm-start study"):
        Row.read({**ROWS[0].write(), **change})

"""The report of a file written by hand has the numbers computed by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nas.spaces.darts import PUBLISHED
from nas.study.analysis import COLUMNS, Row
from pipeline.study import warm_start_preset
from pipeline.study_report import write_report

# start, epochs, distance, accuracies, test accuracy: of three targets in turn
BY_HAND = {
    "a": (
        ("scratch", 4, "", "0.2 0.4 0.7 0.6", "0.50"),  # 0.6 first after 3 epochs
        ("nearest", 1, "1", "0.6", "0.60"),  # 4 / 1
        ("nearest", 2, "1", "0.6 0.5", ""),
        ("random", 1, "2", "0.5", ""),
        ("random", 2, "2", "0.5 0.6", ""),  # 4 / 2
        ("farthest", 1, "3", "0.1", ""),
        ("farthest", 2, "3", "0.1 0.2", ""),  # never
        ("nearest", 4, "1", "0.6 0.6 0.6 0.6", "0.55"),
        ("scratch", 1, "", "0.2", "0.45"),
    ),
    "b": (
        ("scratch", 4, "", "0.2 0.4 0.6 0.8", "0.70"),
        ("nearest", 1, "2", "0.4", "0.72"),
        ("nearest", 2, "2", "0.4 0.8", ""),  # 4 / 2
    ),
    "c": (
        ("scratch", 4, "", "0.2 0.3 0.4 0.5", "0.40"),
        ("nearest", 1, "2", "0.5", "0.43"),  # 4 / 1
        ("nearest", 2, "2", "0.5 0.5", ""),
        ("random", 1, "4", "0.5", ""),  # its other budget has yet to run
    ),
}
# Another seed of the first target: 10 points worse from the nearest, where the first was 10 better.
ANOTHER_SEED = {"a": (("scratch", 4, "", "0.6", "0.50"), ("nearest", 1, "1", "0.6", "0.40"))}


@pytest.fixture
def report(tmp_path: Path) -> str:
    return written(tmp_path, {"0": BY_HAND})


def written(
    tmp_path: Path, seeds: dict[str, dict[str, tuple[tuple[str, int, str, str, str], ...]]]
) -> str:
    rows = []
    for seed, target, cells in (
        (s, t, c) for s, by_target in seeds.items() for t, c in by_target.items()
    ):
        for start, epochs, distance, accuracies, tested in cells:
            row = dict.fromkeys(COLUMNS, "")
            row |= {"target": target, "method": "darts", "seed": seed, "start": start}
            row |= {"epochs": str(epochs), "distance": distance, "accuracies": accuracies}
            row |= {"seconds": "9 " * epochs, "processor_seconds": str(2 * epochs)}
            row |= {"test_accuracy": tested, "final_accuracy": accuracies.split()[-1]}
            row |= {"source": "" if start == "scratch" else f"the {start}"}
            row |= {"genotype": json.dumps(PUBLISHED["DARTS_V2"].to_json())}
            rows.append(row)
    path = tmp_path / "results.csv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    with open(path, newline="") as file:
        known = [Row.read(row) for row in csv.DictReader(file)]
    preset = warm_start_preset(1)
    searches = tuple((name, replace(c, epochs=4, warmup_epochs=1)) for name, c in preset.searches)
    design = replace(preset, searches=searches, budgets=(1, 2), reduced_epochs=1)
    paths = write_report(known, design, tmp_path / "out")
    assert {path.name for path in paths} == {
        "report.md",
        "speed-ups.png",
        "curves.png",
        "distance.png",
        "retrained.png",
    }
    return paths[0].read_text()


def test_speed_ups(report: str) -> None:
    # of nearest 4, 2, 4, two of three fourfold; lower bounds 3, 2 and 4
    assert "16 of 154 rows" in report
    assert (
        "| nearest | darts | 3 | 3 | **4.00** | 3.00 to 4.00 | 2.00 to 4.00 | 67% (21% to 94%) |"
        " 4.00 | 3.00 |" in report
    )
    assert "| random | darts | 1 | 1 | **2.00** |" in report
    assert "| farthest | darts | 1 | 0 | **0.00** |" in report
    assert "| a | 60.0% | after 3.0 epochs | 4.00 | 2.00 | 0.00 | – | the nearest |" in report


def test_one_budget_for_all(report: str) -> None:
    # nearest less scratch 0, -40 and 0 points; Student's t(2) = 4.303, deviation 23.09
    assert "| nearest | darts | 3 | -13.33 (-70.70 to +44.04) |" in report
    assert "| random | darts | 2 | -5.00 " in report
    assert "| scratch | darts | 1 | -40.00 (one pair) |" in report


def test_retrained(report: str) -> None:
    # differences 10, 2 and 3 points: mean 5, deviation 4.359, t(2) = 4.303: 5 +- 10.83;
    # of 8 equally likely signs two are as far out as these
    line = "| nearest 1, scratch 4 | 3 | 53.33% | 58.33% | +5.00 (-5.83 to +15.83) | 0.250 | 100% "
    assert line in report
    assert "| nearest 4, scratch 4 | 1 | 50.00% | 55.00% | +5.00 (one pair) " in report
    assert "| nearest 1, scratch 1 | 1 | 45.00% | 60.00% | +15.00 (one pair) " in report
    assert "| multi 1, scratch" not in report


def test_rivals(report: str) -> None:
    # speed-ups are those of whole races, accuracies those after 1 epoch: 10 and 0 points apart
    assert "| random | 1 | +2.00 (one pair) | 1.000 | 2 | +5.00 " in report
    assert "| scratch | | | | 1 | +40.00 (one pair) " in report


def test_distance(report: str) -> None:
    # distances 1 2 3 2 2 and speed-ups 4 2 0 2 4, ranks 1 3 5 3 3 and 4.5 2.5 1 2.5 4.5:
    # products of deviations -3 0 -4 0 0, over the root of 8 * 9
    assert f"| speed-up | 5 | {-7 / 72**0.5:.2f} | -1.00 |" in report
    # distances 1 2 2 2 4 3 and gains 0 -40 0 -10 0 -50 points, ranks 1 3 3 3 6 5 and 5 2 5 3 5 1:
    # products of deviations -3.75 0.75 -0.75 0.25 3.75 -3.75, over the root of 15.5 * 15.5
    assert f"| accuracy after 1 epochs less the goal | 6 | {-3.5 / 15.5:.2f} | " in report


def test_each_target_counts_once(tmp_path: Path) -> None:
    # means by target: (10 - 10) / 2, 2 and 3 points
    line = "| test | nearest 1 less scratch 4 | 3 | +1.67 ("
    assert line in written(tmp_path, {"0": BY_HAND, "1": ANOTHER_SEED})

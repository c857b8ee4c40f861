"""The report of a file written by hand has the numbers computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nas.spaces.darts import PUBLISHED
from nas.study.analysis import COLUMNS, Row
from pipeline.study_report import write_report

# start, budget, distance, accuracies, test accuracy: of three targets in turn
BY_HAND = {
    "a": (
        ("scratch", "full", "", "0.2 0.4 0.7 0.6", "0.50"),  # 0.6 first after 3 epochs
        ("nearest", "full", "1", "0.6 0.5 0.5 0.9", "0.60"),  # 3 / 1
        ("random", "full", "2", "0.1 0.6 0.6 0.6", ""),  # 3 / 2
        ("farthest", "full", "3", "0.1 0.2 0.3 0.4", ""),  # never
        ("nearest", "reduced", "1", "0.6", "0.50"),
    ),
    "b": (
        ("scratch", "full", "", "0.2 0.4 0.6 0.8", "0.70"),  # 0.8 after 4
        ("nearest", "full", "2", "0.4 0.8 0.8 0.8", "0.72"),  # 4 / 2
        ("nearest", "reduced", "2", "0.4", "0.60"),
    ),
    "c": (
        ("scratch", "full", "", "0.2 0.3 0.4 0.5", "0.40"),  # 0.5 after 4
        ("nearest", "full", "2", "0.5 0.5 0.5 0.5", "0.43"),  # 4 / 1
    ),
}


@pytest.fixture
def report(tmp_path: Path) -> str:
    rows = []
    for target, cells in BY_HAND.items():
        for start, budget, distance, accuracies, tested in cells:
            row = dict.fromkeys(COLUMNS, "")
            row |= {"target": target, "method": "darts", "seed": "0", "start": start}
            row |= {"budget": budget, "distance": distance, "accuracies": accuracies}
            row |= {"seconds": "2 2 2 2" if budget == "full" else "2", "test_accuracy": tested}
            row |= {"source": "" if start == "scratch" else f"the {start}"}
            row |= {"final_accuracy": accuracies.split()[-1]}
            row |= {"genotype": json.dumps(PUBLISHED["DARTS_V2"].to_json())}
            rows.append(row)
    path = tmp_path / "results.csv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    with open(path, newline="") as file:
        known = [Row.read(row) for row in csv.DictReader(file)]
    written = write_report(known, 20, tmp_path / "out")
    assert {path.name for path in written} == {
        "report.md",
        "speed-ups.png",
        "curves.png",
        "distance.png",
        "retrained.png",
    }
    return written[0].read_text()


def test_speed_ups(report: str) -> None:
    # of nearest 2, 3, 4, all above 1; Wilson's lower bound for 3 of 3 is 3 / (3 + 1.96 ** 2)
    assert "10 of 20 rows" in report
    assert (
        "| nearest | darts | 3 | 3 | **3.00** | 2.50 to 3.50 | 2.00 to 4.00 | 100% (44% to 100%) |"
        " 3.00 |" in report
    )
    assert "| farthest | darts | 1 | 0 | **0.00** |" in report
    assert "| a | 60.0% | 3.0 | 3.00 | 1.50 | 0.00 | – | the nearest |" in report


def test_retrained(report: str) -> None:
    # differences 10, 2 and 3 points: mean 5, deviation 4.359, t(2) = 4.303: 5 +- 10.83;
    # of 8 equally likely signs two are as far out as these
    line = "| equal budget | 3 | 53.33% | 58.33% | +5.00 (-5.83 to +15.83) | 0.250 | 100% "
    assert line in report
    # differences 0 and -10 points
    assert "| reduced against full | 2 | 60.00% | 55.00% | -5.00 " in report
    assert "| 0% (0% to 66%) | 1 |" in report
    assert "reduced budget, both" not in report


def test_rivals(report: str) -> None:
    assert "| random | 1 | +1.50 (one pair) | 1.000 | +30.00 (one pair) | 1.000 |" in report
    assert "| scratch | 3 | | | +10.00 " in report


def test_distance(report: str) -> None:
    # distances 1 2 3 2 2 and speed-ups 3 1.5 0 2 4, ranks 1 3 5 3 3 and 4 2 1 3 5: covariance -6
    # of deviations -2 0 2 0 0 and 1 -1 -2 0 2, over the root of 8 * 10
    assert f"single source: {-6 / 80**0.5:.2f}" in report
    assert "same target, method and seed: -1.00" in report

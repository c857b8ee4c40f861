"""Distances that were computed before are not computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sketches import blobs, sketch_of

from nas.transfer.otdd import DatasetSketch, OTDDConfig, cached_distance, distance


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a: DatasetSketch, b: DatasetSketch, config: OTDDConfig) -> float:
        self.calls += 1
        return distance(a, b, config)


def test_once_for_either_order(tmp_path: Path) -> None:
    a, b, compute = sketch_of(*blobs(0)), sketch_of(*blobs(1)), Counted()
    folder = tmp_path / "made"
    values = {cached_distance(*pair, OTDDConfig(), folder, compute) for pair in ((a, b), (b, a))}
    assert compute.calls == 1
    assert values.pop() == pytest.approx(distance(a, b), rel=1e-12)
    assert not values


def test_what_differs_is_computed(tmp_path: Path) -> None:
    a, b, compute = sketch_of(*blobs(0)), sketch_of(*blobs(1)), Counted()
    other_data = replace(b, data_digest="another")
    embedded = [replace(sketch, embedding="another") for sketch in (a, b)]
    cached_distance(a, b, OTDDConfig(), tmp_path, compute)
    cached_distance(a, b, OTDDConfig("means"), tmp_path, compute)
    cached_distance(a, other_data, OTDDConfig(), tmp_path, compute)
    cached_distance(*embedded, OTDDConfig(), tmp_path, compute)
    assert compute.calls == 4
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("content", ["", "{}", '{"distance": "x"}', '{"distance": NaN}', "[1"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, content: str) -> None:
    a, b, compute = sketch_of(*blobs(0)), sketch_of(*blobs(1)), Counted()
    value = cached_distance(a, b, OTDDConfig(), tmp_path, compute)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["distance"] == value
    file.write_text(content)
    assert cached_distance(a, b, OTDDConfig(), tmp_path, compute) == value
    assert compute.calls == 2
    assert json.loads(file.read_text())["distance"] == value

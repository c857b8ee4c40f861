"""Architectures as users name them: published, in a file, of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nas.architecture import Architecture, Skeleton
from nas.errors import ArchitectureError, NASError, TrackingError, UnknownNameError
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED
from pipeline.specification import ARCHITECTURE_FILE, LARGEST_FILE, read_architecture
from pipeline.tracking import Tracker

SKELETON = Skeleton("cifar", 8, 4)
OTHER = Skeleton("imagenet", 12, 14)
# The second-order cells of DARTS as its authors print them (github.com/quark0/darts, genotypes.py).
DARTS_V2_TEXT = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], "
    "reduce_concat=[2, 3, 4, 5])"
)


@pytest.fixture
def darts_v2() -> Architecture:
    return DartsSpace().from_genotype(PUBLISHED["DARTS_V2"], SKELETON)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_genotype(tracker: Tracker, name: str) -> None:
    architecture = read_architecture(name, SKELETON, tracker)
    assert DartsSpace().genotype(architecture) == PUBLISHED[name]
    assert architecture.skeleton == SKELETON


def test_a_file_in_the_text_of_the_darts_code(
    tracker: Tracker, tmp_path: Path, darts_v2: Architecture
) -> None:
    path = tmp_path / "cells.txt"
    path.write_text(f"{DARTS_V2_TEXT}\n")
    assert read_architecture(str(path), SKELETON, tracker) == darts_v2


def test_a_genotype_as_json_takes_the_skeleton(
    tracker: Tracker, tmp_path: Path, darts_v2: Architecture
) -> None:
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(PUBLISHED["DARTS_V2"].to_json()))
    assert read_architecture(str(path), SKELETON, tracker) == darts_v2


def test_an_architecture_as_json_has_its_own_skeleton(
    tracker: Tracker, tmp_path: Path, darts_v2: Architecture
) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(darts_v2.with_skeleton(OTHER).to_json()))
    assert read_architecture(str(path), SKELETON, tracker) == darts_v2.with_skeleton(OTHER)


def test_a_run_that_found_one(tracker: Tracker, darts_v2: Architecture) -> None:
    with tracker.open_run("search") as log:
        log.log_json(darts_v2.to_json(), ARCHITECTURE_FILE)
    # its cells only: the skeleton is that of the supernet, or of another target
    read = read_architecture(f"run:{log.run_id}", OTHER, tracker)
    assert read == darts_v2.with_skeleton(OTHER)


class TestRefused:
    def refuse(self, tracker: Tracker, name: str, error: type[NASError], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            read_architecture(name, SKELETON, tracker)
        assert "\n" not in str(caught.value)

    def test_a_misspelt_name(self, tracker: Tracker) -> None:
        self.refuse(tracker, "DARTSV2", UnknownNameError, "did you mean 'DARTS_V[12]'.*PDARTS")

    def test_a_missing_file(self, tracker: Tracker) -> None:
        self.refuse(tracker, "no/such/file.json", UnknownNameError, "no such file")

    def test_a_folder(self, tracker: Tracker, tmp_path: Path) -> None:
        self.refuse(tracker, str(tmp_path), UnknownNameError, "no such file")

    def test_an_unknown_run(self, tracker: Tracker) -> None:
        self.refuse(tracker, f"run:{'0' * 32}", TrackingError, "artifacts of run 0000")

    @pytest.mark.parametrize("name", ["run:", "run:../../etc"])
    def test_no_run_at_all(self, tracker: Tracker, name: str) -> None:
        self.refuse(tracker, name, TrackingError, "artifacts of run")

    def test_a_run_without_one(self, tracker: Tracker) -> None:
        with tracker.open_run("evaluate") as log:
            log.log_text("nothing", "other.txt")
        self.refuse(tracker, f"run:{log.run_id}", ArchitectureError, f"no {ARCHITECTURE_FILE}")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"[]",
            b"null",
            b"3",
            b'"DARTS_V2"',
            b"{}",
            b'{"decisions": 1}',
            b'{"decisions": {}, "space": "darts", "skeleton": {"stem": "cifar"}}',
            b'{"decisions": {}, "space": "darts", "skeleton": []}',
            b'{"normal": [], "reduce": []}',
            b"\xff\xfe\x00",
            b"__import__('os').system('true')",
            DARTS_V2_TEXT.replace("('sep_conv_3x3', 0)", "print(1)", 1).encode(),
            DARTS_V2_TEXT.replace("sep_conv_3x3", "conv_9x9", 1).encode(),
            b"[" * 50_000,
        ],
    )
    def test_a_file_of_something_else(
        self, tracker: Tracker, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "genotype.json"
        path.write_bytes(content)
        self.refuse(tracker, str(path), ArchitectureError, r"\w")

    def test_a_file_that_is_far_too_large(self, tracker: Tracker, tmp_path: Path) -> None:
        path = tmp_path / "genotype.json"
        path.write_bytes(b" " * (LARGEST_FILE + 1))
        self.refuse(tracker, str(path), ArchitectureError, "too large for an architecture")

"""Supernets in the model registry: what a version has, which ones fit, and what is refused."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient
from small_networks import add
from workplace import Workplace

from nas.data import ImageTask
from nas.errors import CheckpointError, TrackingError
from nas.search.sources import joint_shape
from nas.spaces import DartsSpace
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.transfer.otdd import describe
from nas.transfer.zoo import Card, SourceCard, ZooEntry, image_hashes, save_entry
from pipeline.cli import main
from pipeline.registry import Registered, find_version
from pipeline.tracking import RunLog, Tracker
from pipeline.zoo import (
    EMBEDDING,
    check_registry,
    load_stored,
    misfit,
    publish_supernet,
    registered_supernets,
    supernet_name,
)

CONFIG = SupernetConfig(channels=4, cells=3)
SIGNATURE = DartsSpace().signature(CONFIG)


def entry_of(*tasks: ImageTask, config: SupernetConfig = CONFIG, seed: int = 0) -> ZooEntry:
    card = Card("darts", seed, tuple(map(SourceCard.of, tasks)), (0.25, 0.5), 1.5)
    supernet = Supernet(joint_shape(tasks), config, seed=seed, backend="eager")
    return ZooEntry(supernet, card, image_hashes(*tasks))


def compatible_versions(tracker: Tracker, required: Mapping[str, Any]) -> list[ModelVersion]:
    return [v for v in registered_supernets(tracker) if not misfit(v, required)]


def publish(
    log: RunLog,
    folder: Path,
    task: ImageTask,
    config: SupernetConfig = CONFIG,
    *,
    step: str = "step 1",
    said: list[str] | None = None,
) -> Registered:
    path = folder / f"{step}.safetensors"
    save_entry(path, entry_of(task, config=config))
    return publish_supernet(
        log,
        supernet_name([task.name]),
        path,
        lambda: [describe(task, EMBEDDING, 0)],
        step=step,
        fresh=False,
        say=(said if said is not None else []).append,
    )


def test_what_was_registered_comes_back(log: RunLog, few_digits: ImageTask, tmp_path: Path) -> None:
    registered = publish(log, tmp_path, few_digits)
    assert (registered.name, registered.version, registered.alias) == (
        "supernet-digits", "1", "champion",
    )  # fmt: skip
    (version,) = compatible_versions(log.tracker, SIGNATURE)
    stored = load_stored(log.tracker, version)
    expected = entry_of(few_digits)
    assert stored.entry.card == expected.card
    assert torch.equal(stored.entry.supernet.weights, expected.supernet.weights)
    assert torch.equal(stored.entry.hashes, expected.hashes)
    (sketch,) = stored.sketches
    assert sketch.digest == describe(few_digits, EMBEDDING, 0).digest
    assert version.tags["dataset_digest"] == few_digits.digest
    assert json.loads(version.tags["supernet.signature"]) == SIGNATURE
    files = log.tracker.model_files(registered.model_id)
    about = json.loads((files / "card.json").read_text())
    assert about["signature"] == SIGNATURE
    assert [source["digest"] for source in about["sources"]] == [few_digits.digest]


def test_the_same_step_registers_once(log: RunLog, few_digits: ImageTask, tmp_path: Path) -> None:
    said: list[str] = []
    first = publish(log, tmp_path, few_digits, said=said)
    assert publish(log, tmp_path, few_digits, said=said) == first
    assert "is there from an earlier attempt" in said[0]
    second = publish(log, tmp_path, few_digits, step="step 2")
    assert (second.version, second.alias) == ("2", "challenger")


def test_only_supernets_that_fit_are_found(
    log: RunLog, few_digits: ImageTask, tmp_path: Path
) -> None:
    publish(log, tmp_path, few_digits)
    publish(log, tmp_path, few_digits, replace(CONFIG, channels=8), step="step 2")
    publish(log, tmp_path, few_digits, step="step 3")
    add(log, 0.5)  # a network
    found = [str(v.version) for v in compatible_versions(log.tracker, SIGNATURE)]
    assert found == ["3", "1"]  # the newest first
    some = {"space": "darts", "operations": SIGNATURE["operations"], "pruned": False}
    found = [str(v.version) for v in compatible_versions(log.tracker, some)]
    assert found == ["3", "2", "1"]
    for other in (
        DartsSpace().signature(replace(CONFIG, cells=5)),
        {**some, "pruned": True},
        {**some, "operations": ["skip"]},
    ):
        assert compatible_versions(log.tracker, other) == []
    newest = registered_supernets(log.tracker)[0]
    wider = DartsSpace().signature(replace(CONFIG, channels=8))
    assert "its channels is 4, but that of the search is 8" in misfit(newest, wider)
    assert "has all its operations" in misfit(newest, {**some, "pruned": True})
    log.tracker.client.set_model_version_tag(newest.name, newest.version, "supernet.signature", "[")
    assert "its space is nothing" in misfit(registered_supernets(log.tracker)[0], some)


class TestRefused:
    def test_a_network(self, log: RunLog) -> None:
        add(log, 0.5)
        version = find_version(log.tracker, "animals-net")
        with pytest.raises(TrackingError, match="'animals-net' version 1 is no supernet"):
            load_stored(log.tracker, version)

    @pytest.mark.parametrize("harm", ["altered", "truncated", "gone", "replaced"])
    def test_a_file_that_is_not_the_one_registered(
        self, harm: str, log: RunLog, few_digits: ImageTask, tmp_path: Path
    ) -> None:
        registered = publish(log, tmp_path, few_digits)
        file = log.tracker.model_files(registered.model_id) / "supernet.safetensors"
        if harm == "gone":
            file.unlink()
        elif harm == "replaced":  # by a sound one
            save_entry(file, entry_of(few_digits, seed=1))
        else:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data if harm == "altered" else data[:-10])
        version = find_version(log.tracker, "supernet-digits")
        with pytest.raises(CheckpointError, match=r"not the file that was|there is no checkpoint"):
            load_stored(log.tracker, version)

    def test_a_version_without_a_digest(
        self, log: RunLog, few_digits: ImageTask, tmp_path: Path
    ) -> None:
        publish(log, tmp_path, few_digits)
        log.tracker.client.delete_model_version_tag("supernet-digits", "1", "supernet.digest")
        with pytest.raises(CheckpointError, match="not the file that was registered"):
            load_stored(log.tracker, find_version(log.tracker, "supernet-digits"))


@pytest.fixture
def no_registry(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", address)


def test_a_registry_that_does_not_answer(tracker: Tracker, no_registry: None) -> None:
    with pytest.raises(TrackingError, match=r"registry .* cannot be used .*refused"):
        check_registry()
    with pytest.raises(TrackingError, match="MLFLOW_REGISTRY_URI names cannot"):
        registered_supernets(tracker)


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain"],
        ["search", "--contribute"],
        ["search", "--warm-start", "auto"],
        ["transfer"],
        ["transfer", "--transfer", "supernet", "--source", "auto"],
    ],
)
def test_nothing_is_searched_for_a_registry_that_does_not_answer(
    command: list[str], no_registry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    assert "registry that MLFLOW_REGISTRY_URI names cannot be used" in capsys.readouterr().err
    assert len(MlflowClient().search_runs(["0", "1"])) == 1  # the job, without a step


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["digits"], "supernet-digits"),
        (["mnist5k", "digits"], "supernet-digits+mnist5k"),
        (["folder:/data/my 'pets'"], "supernet-my--pets-"),
        (["folder:data/../data/a:b"], "supernet-a-b"),
    ],
)
def test_names(names: list[str], expected: str) -> None:
    assert supernet_name(names) == expected


def test_many_sources_have_a_short_name() -> None:
    names = [f"a-rather-long-name-{number}" for number in range(20)]
    assert supernet_name(names).startswith("supernet-20-sets-")
    assert supernet_name(names) == supernet_name(names[::-1]) != supernet_name(names[1:])

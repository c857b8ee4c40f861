"""Supernets from pretraining to transfer: registered, ranked, gone on from, contributed, killed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from jobs import Place, arguments
from mlflow.entities import Run
from test_stopping import PATIENCE, wait_for_work
from torch import Tensor

from nas.checkpoint import load_checkpoint
from pipeline.cli import main
from pipeline.lineage import lineage
from pipeline.registry import logged_model_id

SIZE = {"search_epochs": 2, "search_cells": 3, "search_channels": 4}
PRETRAIN = {"sources": "digits,mnist5k", "source_limit": 200, "each": "true", **SIZE}
TRANSFER = {
    "transfer": "supernet",
    "source": "auto",
    "target": "animals",
    "target_limit": 200,
    "target_size": 8,
    "cells": 3,
    "channels": 4,
    "train_epochs": 1,
    "seeds": 1,
    **SIZE,
}
SEARCH = {"source": "animals", "source_limit": 200, "source_size": 8, **SIZE}


def ranking(place: Place, job: Run) -> list[dict[str, Any]]:
    path = place.enter().artifacts(job.info.run_id) / "ranking.json"
    return list(json.loads(path.read_text())["supernets"])


def versions(place: Place) -> set[str]:
    found = place.client.search_model_versions("tags.kind = 'supernet'")
    return {f"{version.name}/{version.version}" for version in found}


def supernet_of(place: Place, search: Run) -> Mapping[str, Tensor]:
    path = place.enter().artifacts(search.info.run_id) / "supernet.safetensors"
    return load_checkpoint(path).tensors


def searches(place: Place) -> dict[str, Mapping[str, Tensor]]:
    """The supernet of each finished search, by the name of its run."""
    found = place.runs("tags.step = 'search' and status = 'FINISHED'")
    return {run.info.run_name or "": supernet_of(place, run) for run in found}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].equal(theirs[name]), name


def test_pretrained_ranked_taken_and_contributed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *arguments(PRETRAIN)]) == 0
    assert versions(place) == {
        "supernet-digits/1", "supernet-mnist5k/1", "supernet-digits+mnist5k/1",
    }  # fmt: skip
    pretraining = place.jobs()[-1]
    assert set(pretraining.data.tags["supernet.versions"].split(",")) == versions(place)

    command = ["transfer", *arguments({**TRANSFER, "contribute": "true"})]
    assert main(command) == 0
    output = capsys.readouterr().out
    job = place.jobs()[-1]
    rows = ranking(place, job)
    assert {row["supernet"].split()[0] for row in rows} == {
        "supernet-digits", "supernet-mnist5k", "supernet-digits+mnist5k",
    }  # fmt: skip
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    assert all(row["refused"] == "" and row["overlap"] == 0 for row in rows)
    # the shared supernet has the sketches of the other two: there were only two to measure
    assert len(list((place.folder / "home" / "distances").iterdir())) == 2
    taken = rows[0]["supernet"]
    assert f"beginning with {taken}" in output
    assert job.data.metrics["warm/distance"] == rows[0]["distance"]
    name, number = taken.split(" version ")
    model = logged_model_id(place.client.get_model_version(name, number))
    inputs = place.client.get_run(job.info.run_id).inputs
    assert model in {entry.model_id for entry in inputs.model_inputs}
    (search,) = [
        run for run in place.runs("tags.step = 'search'") if "warm.source" in run.data.params
    ]
    assert search.data.params["warm.source"] == taken
    assert search.data.tags["source"] == "animals"
    assert "supernet-animals/1" in versions(place)

    uri = f"models:/nas-animals/{job.data.tags['model.version']}"
    back = lineage(place.enter(), uri)
    assert job.data.tags["lineage.source_run"] in {step.run_id for step in back.steps}
    assert {data.name for data in back.datasets} >= {"animals", "mnist5k"}

    # again: its own supernet is there now, and is not taken; every step is reused
    before = len(place.runs())
    assert main(command) == 0
    assert "searching from scratch" not in capsys.readouterr().out
    again = ranking(place, place.jobs()[-1])
    assert again[0]["supernet"] == taken
    assert again[-1]["supernet"] == "supernet-animals version 1"
    assert again[-1]["refused"] == "searched on the target itself"
    assert len(place.runs()) == before + 1
    assert "supernet-animals/2" not in versions(place)

    # what it began with counts as its own: it is not for the sets behind that one
    begun_from = rows[0]["sources"][0]
    command = ["search", *arguments({**SEARCH, "warm_start": "auto"})]
    command[command.index("animals")] = begun_from
    assert main(command) == 0
    (row,) = [r for r in ranking(place, place.jobs()[-1]) if "animals" in r["supernet"]]
    assert row["overlap"] == 1
    assert "what it began with, was searched on 100.0%" in row["refused"]


def test_named_beginnings_are_all_the_same_supernet(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of its model, its version, its run and its data set."""
    alone = {**PRETRAIN, "sources": "digits", "source_size": 8}
    assert main(["pretrain", *arguments(alone)]) == 0
    (step,) = place.runs("tags.step = 'search'")
    job = place.jobs()[-1]
    outcomes = []
    for start in (
        "supernet-digits", "supernet-digits/1", "models:/supernet-digits@champion",
        f"run:{step.info.run_id}", "digits",
    ):  # fmt: skip
        assert main(["search", *arguments({**SEARCH, "warm_start": start})]) == 0
        run_id = place.jobs()[-1].data.tags["lineage.search_run"]
        outcomes.append(run_id)
    assert len(set(outcomes)) == 1  # one search, reused
    by_its_trunk = set()
    for features in ("supernet-digits", f"run:{step.info.run_id}"):
        wanted = {"datasets": "digits,animals", "limit": 100, "features": features}
        assert main(["distance", *arguments(wanted)]) == 0
        by_its_trunk.add(place.jobs()[-1].data.metrics["otdd/digits/animals"])
    assert len(by_its_trunk) == 1
    assert job.info.status == "FINISHED"
    assert main(["search", *arguments(SEARCH)]) == 0
    assert place.jobs()[-1].data.tags["lineage.search_run"] != outcomes[0]
    capsys.readouterr()

    other = {**SEARCH, "search_channels": 8, "warm_start": "supernet-digits"}
    assert main(["search", *arguments(other)]) == 1
    complaint = capsys.readouterr().err
    assert "does not fit: its channels is 4, but that of the search is 8" in complaint
    for start, message in (
        ("supernet-digit", "did you mean 'supernet-digits'?"),
        ("supernet-digits/7", "supernet-digits"),
        ("run:0123", "names no search"),
    ):
        assert main(["search", *arguments({**SEARCH, "warm_start": start})]) == 1
        assert message in capsys.readouterr().err


def test_the_last_stages_begin_with_the_operations_of_others(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Warm-started DARTS: only supernets that were searched in stages are ranked."""
    size = {**SIZE, "search_epochs": 1}
    assert main(["pretrain", *arguments({**PRETRAIN, **size, "sources": "digits"})]) == 0
    staged = {**size, "method": "pdarts"}
    assert main(["pretrain", *arguments({**PRETRAIN, **staged, "sources": "mnist5k"})]) == 0
    version = place.client.get_model_version("supernet-mnist5k", "1")
    assert version.description.endswith("-P method=pdarts -P warm_stages=1")

    command = {**SEARCH, **staged, "warm_start": "auto", "warm_stages": 1, "warm_what": "weights"}
    capsys.readouterr()
    assert main(["search", *arguments(command)]) == 0
    job = place.jobs()[-1]
    assert [row["supernet"] for row in ranking(place, job)] == ["supernet-mnist5k version 1"]
    assert job.data.metrics["cost/search_epochs"] == 1
    found = searches(place)
    (ours,) = [tensors for name, tensors in found.items() if "from supernet-mnist5k" in name]
    (theirs,) = [tensors for name, tensors in found.items() if name == "search on mnist5k"]
    assert ours["dropped"].equal(theirs["dropped"])
    assert (ours["dropped"] == 0).sum(-1).eq(3).all()

    whole = {**command, "warm_stages": 0, "warm_what": "both", "warm_start": "supernet-mnist5k"}
    darts = {**command, "method": "darts"}
    unpruned = {**command, "warm_start": "supernet-digits", "warm_what": "operations"}
    for refused, message in (
        (whole, "it lost operations"),
        (darts, "has 1 in all"),
        (unpruned, "has all its operations"),
    ):
        assert main(["search", *arguments(refused)]) == 1
        assert message in capsys.readouterr().err


def test_nothing_there_is_said_and_searched_from_scratch(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *arguments({**SEARCH, "warm_start": "auto"})]) == 0
    output = capsys.readouterr().out
    assert "searching from scratch: no supernet is registered" in output
    scratch = place.jobs()[-1]
    assert ranking(place, scratch) == []
    assert main(["search", *arguments(SEARCH)]) == 0
    assert "reusing search on animals" in capsys.readouterr().out  # the very same

    alone = {**PRETRAIN, "sources": "digits", "search_channels": 8, "search_epochs": 1}
    assert main(["pretrain", *arguments(alone)]) == 0
    capsys.readouterr()
    assert main(["search", *arguments({**SEARCH, "warm_start": "auto"})]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "none of the registered supernets (1) fits; the newest, supernet-digits version 1" in output
    )
    assert "its channels is 8, but that of the search is 4" in output


def test_a_supernet_that_was_altered_is_not_taken(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {**PRETRAIN, "sources": "digits"}
    assert main(["pretrain", *arguments(alone)]) == 0
    for file in Path(place.folder, "artifacts", "models").rglob("supernet.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert main(["search", *arguments({**SEARCH, "warm_start": "auto"})]) == 0
    assert "searching from scratch: none of them may be taken" in capsys.readouterr().out
    (row,) = ranking(place, place.jobs()[-1])
    assert "is not the file that was registered" in row["refused"]
    assert main(["search", *arguments({**SEARCH, "warm_start": "supernet-digits"})]) == 1
    assert "is not the file that was registered" in capsys.readouterr().err

    model = logged_model_id(place.client.get_model_version("supernet-digits", "1"))
    place.client.delete_logged_model(model)
    assert main(["search", *arguments({**SEARCH, "warm_start": "auto"})]) == 0
    (row,) = ranking(place, place.jobs()[-1])
    assert row["refused"].startswith("cannot be read: ")
    assert model in row["refused"]


def test_kills_at_random_moments_change_no_bit(
    place: Place, tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> None:
    longer = {**PRETRAIN, "search_epochs": 8}
    command = {**SEARCH, "search_epochs": 8, "warm_start": "auto"}
    undisturbed = Place.make(tmp_path_factory.mktemp("undisturbed"), empty_store)
    for entry_point, options in (("pretrain", longer), ("search", command)):
        process = undisturbed.start(entry_point, options)
        process.join(PATIENCE)
        assert process.exitcode == 0
    expected = searches(undisturbed)
    assert len(expected) == 4

    moments = random.Random(4)
    killed = 0
    for entry_point, options in (("pretrain", longer), ("search", command)):
        for longest in (1.0, 2.0, 3.0):
            process = place.start(entry_point, options)
            wait_for_work(place, process)
            process.join(moments.uniform(0, longest))
            killed += process.exitcode is None
            process.kill()
            process.join()
        process = place.start(entry_point, options)
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert killed >= 2
    assert "RUNNING" not in place.statuses()
    assert versions(place) == versions(undisturbed)
    ours = searches(place)
    assert ours.keys() == expected.keys()
    for name, tensors in expected.items():
        assert_same(ours[name], tensors)

"""The entry points as users run them: `mlflow run`, then what the store has of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from conftest import Finished
from jobs import SEARCH, TRAINING, TRANSFER, Place, arguments, bits_of
from mlflow.entities import Run
from striped_images import write_stripes

from pipeline.cli import main
from pipeline.inputs import datasets_of
from pipeline.lineage import lineage

Children = Callable[[str], list[Run]]

EPOCH_METRICS = {
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "lr",
    "images_per_second",
    "epoch_seconds",
    "peak_memory_mb",
}
COLLAPSE_METRICS = {
    "alpha/entropy_normal",
    "alpha/entropy_reduce",
    "skip/normal",
    "skip/reduce",
    "discretised/accuracy",
    "discretised/gap",
}


def pictures(finished: Finished, run: Run) -> set[str]:
    found = finished.place.client.list_artifacts(run.info.run_id, "pictures")
    assert all(entry.file_size > 5_000 for entry in found)
    return {entry.path.removeprefix("pictures/") for entry in found}


def history(finished: Finished, run: Run, metric: str) -> list[int]:
    return [m.step for m in finished.place.client.get_metric_history(run.info.run_id, metric)]


class TestTransfer:
    def test_its_runs_are_finished_and_nested(self, finished: Finished, children: Children) -> None:
        assert finished.job.info.status == "FINISHED"
        assert finished.job.info.run_name == "transfer digits to animals (darts, seed 0)"
        steps = {step: len(children(step)) for step in ("search", "train", "evaluate", "register")}
        assert steps == {"search": 1, "train": 4, "evaluate": 1, "register": 1}
        nested = f"tags.`mlflow.parentRunId` = '{finished.job.info.run_id}'"
        assert [run.info.status for run in finished.place.runs(nested)] == 7 * ["FINISHED"]

    def test_it_ends_with_a_table(self, finished: Finished) -> None:
        output = re.sub(" +", " ", finished.output)
        metrics = finished.job.data.metrics
        linear = f"{metrics['test/linear']:.2%}"
        for row in (
            r" source digits \(linear model \d\d\.\d\d%, validation\)",
            rf" target animals \(linear model {linear}\)",
            r" architecture darts, cell transfer",
            rf" test accuracy {metrics['test/accuracy']:.2%} \(95% interval .* to .*%\), n = 2",
            rf" random baseline {metrics['random/accuracy']:.2%} \(95% .*\), n = 2",
            r" relative improvement [+-]\d+\.\d\d% \(95% interval .*%\)",
            r" parameters \d+\.?\d* k",
            r" multiply-adds \d+\.?\d* k",
            r" search time \d+\.?\d* s",
            r" registered model nas-animals version 1 \(champion\)",
        ):
            assert re.search(row, output), row
        assert f"mlflow ui --backend-store-uri {finished.place.uri}" in output

    def test_its_description_is_the_table(self, finished: Finished) -> None:
        description = finished.job.data.tags["mlflow.note.content"]
        accuracy = f"{finished.job.data.metrics['test/accuracy']:.2%}"
        assert f"| test accuracy | {accuracy} (95% interval" in description
        assert "| registered model | nas-animals version 1 (champion) |" in description

    def test_parameters(self, finished: Finished, children: Children) -> None:
        assert {key: finished.job.data.params[key] for key in TRANSFER} == {
            key: str(value) for key, value in TRANSFER.items()
        }
        (search,) = children("search")
        assert search.data.params["search.epochs"] == finished.job.data.params["search.epochs"]
        assert search.data.params["search.supernet.channels"] == "4"
        for run in (finished.job, *children("train")):
            assert run.data.params["train.epochs"] == "1"
            assert run.data.params["network.channels"] == "4"
            assert run.data.params["network.cells"] == "3"

    def test_metrics_by_epoch(self, finished: Finished, children: Children) -> None:
        (search,) = children("search")
        for metric in EPOCH_METRICS | COLLAPSE_METRICS:
            assert history(finished, search, metric) == [0, 1], metric
        for training in children("train"):
            for metric in EPOCH_METRICS:
                assert history(finished, training, metric) == [0], metric

    def test_metrics_of_the_whole(self, finished: Finished, children: Children) -> None:
        metrics = finished.job.data.metrics
        (search,) = children("search")
        accuracies = [test for _, test in finished.bits.accuracies.values()]
        assert metrics["test/accuracy"] == pytest.approx(sum(accuracies[:2]) / 2)
        assert metrics["random/accuracy"] == pytest.approx(sum(accuracies[2:]) / 2)
        assert metrics["relative_improvement"] == pytest.approx(
            100 * (metrics["test/accuracy"] / metrics["random/accuracy"] - 1)
        )
        assert metrics["search/seconds"] == search.data.metrics["search/seconds"]
        assert metrics["cost/transfer_seconds"] == pytest.approx(
            metrics["search/seconds"] + metrics["cost/training_seconds"]
        )
        assert {"params", "macs", "val/accuracy", "test/linear"} <= metrics.keys()

    def test_tags(self, finished: Finished) -> None:
        tags = finished.job.data.tags
        assert {tags[key] for key in ("space", "method", "transfer", "source", "target")} == {
            "darts", "cell", "digits", "animals",
        }  # fmt: skip
        assert tags["device"].startswith("cpu") or tags["device"]
        assert re.fullmatch(r"[0-9a-f]{40}", tags["mlflow.source.git.commit"])
        assert re.fullmatch(r"[0-9a-f]{12}", tags["genotype.digest"])
        assert (tags["model.name"], tags["model.version"]) == ("nas-animals", "1")
        experiment = finished.place.client.get_experiment(finished.job.info.experiment_id)
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    def test_data_sets_are_inputs(self, finished: Finished, children: Children) -> None:
        inputs = {(d.name, d.context) for d in datasets_of(finished.job)}
        assert inputs == {("digits", "source"), ("animals", "target")}
        (search,) = children("search")
        (source,) = datasets_of(search)
        assert (source.name, source.digest) == (
            "digits",
            finished.job.data.tags["lineage.source_digest"],
        )

    def test_pictures_and_files(self, finished: Finished, children: Children) -> None:
        (search,), (evaluation,) = children("search"), children("evaluate")
        assert pictures(finished, search) == {"alphas.png", "cells.png", "curves.png"}
        assert pictures(finished, evaluation) == {"confusion.png"}
        assert pictures(finished, finished.job) >= {
            "cells.png",
            "comparison.png",
            "learning_curves.png",
        }
        for training in children("train"):
            assert pictures(finished, training) == {"cells.png", "curves.png"}
        assert {"normal", "reduce"} <= finished.bits.genotype.keys()

    def test_the_registered_version_leads_back_to_everything(
        self, finished: Finished, children: Children
    ) -> None:
        tracker = finished.place.enter()
        found = lineage(tracker, "models:/nas-animals/1")
        (search,) = children("search")
        assert found.version == "1"
        assert found.job.run_id == finished.job.info.run_id
        steps = {run.run_id for run in found.steps}
        assert len(steps) == 7
        assert found.tags["lineage.search_run"] == search.info.run_id
        assert found.tags["genotype_digest"] == finished.job.data.tags["genotype.digest"]
        assert {data.name for data in found.datasets} == {"digits", "animals"}
        assert {data.digest for data in found.datasets} >= {
            finished.job.data.tags["lineage.source_digest"],
            finished.job.data.tags["lineage.target_digest"],
        }
        search = finished.place.client.get_run(search.info.run_id)  # with its models
        (model,) = finished.job.outputs.model_outputs
        assert model.model_id == found.model_id
        (supernet,) = finished.job.inputs.model_inputs
        assert supernet.model_id in {output.model_id for output in search.outputs.model_outputs}


class TestAgain:
    def test_every_finished_step_is_reused_and_says_so(
        self, finished: Finished, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place, before = finished.place, len(finished.place.runs())
        versions = len(place.client.search_model_versions("name = 'nas-animals'"))
        place.enter()
        assert main(["transfer", *arguments(TRANSFER)]) == 0
        output = capsys.readouterr().out
        said = re.findall(r"^reusing (.*) \(run", output, re.MULTILINE)
        assert sorted(said) == [
            "evaluate on animals",
            "register nas-animals",
            "search on digits",
            "train random 0 on animals",
            "train random 1 on animals",
            "train transferred, seed 0 on animals",
            "train transferred, seed 1 on animals",
        ]
        again = place.jobs()[-1]
        assert again.info.status == "FINISHED"
        assert again.data.params == finished.job.data.params
        assert len(place.runs()) == before + 1
        for name, value in finished.job.data.metrics.items():
            if not name.startswith("system/"):
                assert again.data.metrics[name] == value, name
        assert len(place.client.search_model_versions("name = 'nas-animals'")) == versions
        bits_of(place, again).same_as(finished.bits)

    def test_fresh_runs_anew_and_ends_with_the_same_bits(
        self, finished: Finished, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place, before = finished.place, len(finished.place.runs())
        versions = len(place.client.search_model_versions("name = 'nas-animals'"))
        place.enter()
        assert main(["transfer", *arguments(TRANSFER), "--fresh", "true", "--parallel", "1"]) == 0
        assert "reusing" not in capsys.readouterr().out
        fresh = place.jobs()[-1]
        assert len(place.runs()) == before + 8
        assert fresh.data.tags["model.version"] == str(versions + 1)
        # no better than the champion, which stays
        assert fresh.data.tags["model.alias"] == "challenger"
        bits_of(place, fresh).same_as(finished.bits)


def test_photographs_of_mixed_sizes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The registered network is tested on the files as they are, and does as well as before."""
    target = f"folder:{write_stripes(place.folder / 'stripes')}"
    recipe = {"cells": 3, "channels": 4, "seeds": 2, "train_epochs": 3}
    options = {"architecture": "DARTS_V2", "target": target, "target_size": 16, **recipe}
    assert main(["retrain", *arguments(options)]) == 0
    retraining = place.jobs()[-1]
    tested = json.loads(
        (place.enter().artifacts(retraining.info.run_id) / "comparison.json").read_text()
    )["networks"][:2]
    best = max(tested, key=lambda row: row["validation_accuracy"])
    assert main(["evaluate", *arguments({"model": "nas-stripes", "target": target})]) == 0
    assert place.jobs()[-1].data.metrics["test/accuracy"] == best["test_accuracy"]
    assert f"nas-stripes version 1 on {target}: {best['test_accuracy']:.2%}" in (
        capsys.readouterr().out
    )


def test_search_retrain_evaluate(finished: Finished) -> None:
    """A search, a network of other width from what it found, and a test of what was registered."""
    place = finished.place
    output = place.mlflow_run("search", SEARCH)
    assert "reusing search on digits" in output  # the transfer has paid for it
    search = place.jobs()[-1]
    run = f"run:{search.info.run_id}"
    assert f"python -m pipeline retrain --architecture {run}" in output

    output = place.mlflow_run(
        "retrain", {**TRAINING, "architecture": run, "channels": 2, "seeds": 1}
    )
    assert "(one training: no interval), n = 1" in output
    retraining = place.jobs()[-1]
    version = retraining.data.tags["model.version"]
    assert f"nas-animals version {version}" in re.sub(" +", " ", output)
    back = lineage(place.enter(), f"models:/nas-animals/{version}")
    assert search.data.tags["lineage.search_run"] in {step.run_id for step in back.steps}
    assert {data.name for data in back.datasets} == {"digits", "animals"}

    output = place.mlflow_run(
        "evaluate",
        {"model": f"models:/nas-animals/{version}", "target": "animals", "target_limit": 300},
    )
    evaluation = place.jobs()[-1]
    rows = json.loads(
        (place.enter().artifacts(retraining.info.run_id) / "comparison.json").read_text()
    )["networks"]
    assert evaluation.data.metrics["test/accuracy"] == rows[0]["test_accuracy"]
    assert f"nas-animals version {version} on animals: {rows[0]['test_accuracy']:.2%}" in output
    assert place.statuses() == {"FINISHED"}

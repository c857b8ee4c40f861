"""The entry points as users run them: `mlflow run`, then what the store has of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
from conftest import Finished
from jobs import ROOT, SEARCH, TRAINING, TRANSFER, Place, arguments, bits_of
from mlflow.entities import Run
from striped_images import write_stripes

from pipeline.cli import main
from pipeline.inputs import datasets_of
from pipeline.lineage import lineage
from pipeline.specification import ARCHITECTURE_FILE

Children = Callable[[str], list[Run]]

DISTANCE = {"datasets": "digits,animals", "limit": 300, "points": 100}
LOOP_METRICS = {"lr", "images_per_second", "epoch_seconds", "peak_memory_mb"}
TRAINING_METRICS = LOOP_METRICS | {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
SEARCH_METRICS = LOOP_METRICS | {
    "supernet/train_loss",
    "supernet/train_accuracy",
    "supernet/val_loss",
    "supernet/val_accuracy",
    "supernet/discretised_accuracy",
    "supernet/discretised_gap",
    "alpha/entropy_normal",
    "alpha/entropy_reduce",
    "skip/normal",
    "skip/reduce",
    "genotype/age",
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
        linear = f"{metrics['linear/test_accuracy']:.2%}"
        for row in (
            r" source digits \(linear model \d\d\.\d\d%, validation\)",
            rf" target animals \(linear model {linear}\)",
            r" architecture darts, cell transfer",
            rf" test accuracy {metrics['test/accuracy']:.2%} \(95% interval .* to .*%\), n = 2",
            rf" random baseline {metrics['random/test_accuracy']:.2%} \(95% .*\), n = 2",
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
        for metric in SEARCH_METRICS:
            assert history(finished, search, metric) == [0, 1], metric
        for training in children("train"):
            for metric in TRAINING_METRICS:
                assert history(finished, training, metric) == [0], metric

    def test_metrics_of_the_whole(self, finished: Finished, children: Children) -> None:
        metrics = finished.job.data.metrics
        (search,), (evaluation,) = children("search"), children("evaluate")
        validated, tested = zip(*finished.bits.accuracies.values(), strict=True)
        assert metrics["val/accuracy"] == pytest.approx(sum(validated[:2]) / 2)
        assert metrics["test/accuracy"] == pytest.approx(sum(tested[:2]) / 2)
        assert metrics["random/test_accuracy"] == pytest.approx(sum(tested[2:]) / 2)
        assert metrics["model/val_accuracy"] == max(validated[:2])
        best = validated.index(max(validated[:2]))
        assert metrics["model/test_accuracy"] == tested[best]
        assert metrics["model/test_accuracy_low"] < tested[best]
        assert metrics["relative_improvement"] == pytest.approx(
            100 * (metrics["test/accuracy"] / metrics["random/test_accuracy"] - 1)
        )
        for name in ("cost/search_seconds", "supernet/val_accuracy"):
            assert metrics[name] == search.data.metrics[name]
        assert metrics["cost/transfer_seconds"] == pytest.approx(
            metrics["cost/search_seconds"] + metrics["cost/training_seconds"]
        )
        seconds = sum(run.data.metrics["cost/training_seconds"] for run in children("train"))
        assert metrics["cost/training_seconds"] + metrics["cost/baseline_seconds"] == (
            pytest.approx(seconds)
        )
        for name, value in evaluation.data.metrics.items():
            assert metrics[name] == value, name
        for run in children("train"):
            assert run.data.metrics["val/accuracy"] in validated
            assert run.data.params["network.cells"] == "3"
        ours = [run for run in children("train") if run.data.tags["group"] == "transferred"]
        for run in ours:
            for name in ("params", "macs"):
                assert run.data.metrics[name] == metrics[name]
            assert run.data.params["network.digest"] == finished.job.data.params["network.digest"]

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
        assert pictures(finished, finished.job) == {
            "alphas.png",
            "cells.png",
            "comparison.png",
            "confusion.png",
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
    assert place.jobs()[-1].data.metrics["model/test_accuracy"] == best["test_accuracy"]
    assert f"nas-stripes version 1 on {target}: {best['test_accuracy']:.2%}" in (
        capsys.readouterr().out
    )


@dataclass(frozen=True)
class Others:
    """A search, a network of other width from what it found, a test of what was registered,
    and the distance of two sets by the features of the search's supernet.

    ``transfer`` is the one that paid for the search.
    """

    transfer: Run
    search: Run
    retraining: Run
    evaluation: Run
    distance: Run
    outputs: dict[str, str]


@pytest.fixture(scope="module")
def others(finished: Finished) -> Others:
    place, client = finished.place, finished.place.client
    transfer = [run for run in place.jobs() if "transfer" in run.data.tags][-1]
    outputs = {"search": place.mlflow_run("search", SEARCH)}
    search = place.jobs()[-1]
    architecture = f"run:{search.info.run_id}"
    outputs["retrain"] = place.mlflow_run(
        "retrain", {**TRAINING, "architecture": architecture, "channels": 2, "seeds": 1}
    )
    retraining = place.jobs()[-1]
    model = f"models:/nas-animals/{retraining.data.tags['model.version']}"
    outputs["evaluate"] = place.mlflow_run(
        "evaluate", {"model": model, "target": "animals", "target_limit": 300}
    )
    evaluation = place.jobs()[-1]
    outputs["distance"] = place.mlflow_run("distance", DISTANCE | {"features": architecture})
    jobs = (transfer, search, retraining, evaluation, place.jobs()[-1])
    place.enter()
    tiny = {**SEARCH, "source_limit": 100, "search_epochs": 1}
    del tiny["source"]
    assert main(["pretrain", *arguments({**tiny, "sources": "digits,mnist5k"})]) == 0
    warm = {**tiny, "source": "animals", "source_size": 8, "warm_start": "auto"}
    assert main(["search", *arguments({**warm, "contribute": "true"})]) == 0
    # with their models, which a search leaves out
    return Others(*(client.get_run(run.info.run_id) for run in jobs), outputs)


class TestOtherEntryPoints:
    def test_search(self, finished: Finished, others: Others) -> None:
        search, transfer = others.search.data, others.transfer.data
        assert "reusing search on digits" in others.outputs["search"]  # the transfer has paid
        train = f"python -m pipeline retrain --architecture run:{others.search.info.run_id}"
        assert train in others.outputs["search"]
        assert pictures(finished, others.search) == {"alphas.png", "cells.png", "curves.png"}
        for name, value in transfer.params.items():
            if name.startswith("search."):
                assert search.params[name] == value
        for name in ("cost/search_seconds", "supernet/val_accuracy"):
            assert search.metrics[name] == transfer.metrics[name]
        assert {"params", "macs"} <= search.metrics.keys()
        assert search.params["network.channels"] == "4"
        assert search.tags["genotype.digest"] == transfer.tags["genotype.digest"]

    def test_a_retrained_run_has_its_search_as_a_transfer_has(
        self, finished: Finished, others: Others
    ) -> None:
        assert "(one training: no interval), n = 1" in others.outputs["retrain"]
        assert re.search(r"source +digits *\n", others.outputs["retrain"])
        assert re.search(r"search time +\d", others.outputs["retrain"])
        retraining, transfer = others.retraining, others.transfer
        for name in ("search_run", "supernet", "genotype", "source_digest", "target_digest"):
            tag = f"lineage.{name}"
            assert retraining.data.tags[tag] == transfer.data.tags[tag]
        assert retraining.inputs.model_inputs == transfer.inputs.model_inputs
        assert {(d.name, d.context) for d in datasets_of(retraining)} == {
            ("digits", "source"),
            ("animals", "target"),
        }
        metrics = retraining.data.metrics
        assert metrics["cost/search_seconds"] == transfer.data.metrics["cost/search_seconds"]
        assert metrics["cost/transfer_seconds"] == pytest.approx(
            metrics["cost/search_seconds"] + metrics["cost/training_seconds"]
        )
        assert "alphas.png" in pictures(finished, retraining)
        version = retraining.data.tags["model.version"]
        output = re.sub(" +", " ", others.outputs["retrain"])
        assert f"nas-animals version {version}" in output
        back = lineage(finished.place.enter(), f"models:/nas-animals/{version}")
        assert back.tags["lineage.supernet"] == transfer.data.tags["lineage.supernet"]
        search_run = transfer.data.tags["lineage.search_run"]
        assert search_run in {step.run_id for step in back.steps}
        assert {data.name for data in back.datasets} == {"digits", "animals"}

    def test_an_architecture_whose_search_is_not_known(
        self, finished: Finished, others: Others, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tracker = finished.place.enter()
        with tracker.open_run("from elsewhere") as log:
            log.log_artifact(tracker.artifacts(others.search.info.run_id) / ARCHITECTURE_FILE)
        options = {**TRAINING, "architecture": f"run:{log.run_id}", "channels": 2, "seeds": 1}
        assert main(["retrain", *arguments(options)]) == 0
        output = capsys.readouterr().out
        assert (
            f"the search behind run:{log.run_id} is neither an input nor charged: the run names "
            "no search that its cells come from\n"
        ) in output
        assert "search time" not in output
        job = finished.place.jobs()[-1]
        assert not {"cost/search_seconds", "cost/transfer_seconds"} & job.data.metrics.keys()
        assert "lineage.search_run" not in job.data.tags

    def test_evaluate(self, finished: Finished, others: Others) -> None:
        tracker = finished.place.enter()
        artifacts = tracker.artifacts(others.retraining.info.run_id)
        rows = json.loads((artifacts / "comparison.json").read_text())["networks"]
        metrics = others.evaluation.data.metrics
        assert metrics["model/test_accuracy"] == rows[0]["test_accuracy"]
        for name, value in metrics.items():
            assert others.retraining.data.metrics[name] == value, name
        version = others.retraining.data.tags["model.version"]
        said = f"nas-animals version {version} on animals: {rows[0]['test_accuracy']:.2%}"
        assert said in others.outputs["evaluate"]
        assert finished.place.statuses() == {"FINISHED"}

    def test_distance_in_the_eyes_of_a_supernet(self, finished: Finished, others: Others) -> None:
        assert "features: trunk of a supernet for 8x8x1" in others.outputs["distance"]
        metrics = others.distance.data.metrics
        assert metrics["otdd/digits/animals"] > 0
        said = f"nearest to digits: animals at {metrics['otdd/digits/animals']:.4g}"
        assert said in others.outputs["distance"]
        assert pictures(finished, others.distance) == {"distances.png", "map.png"}
        assert {(d.name, d.context) for d in datasets_of(others.distance)} == {
            ("digits", "compared"),
            ("animals", "compared"),
        }


def documented(heading: str) -> set[str]:
    """The names in the first column of a table of docs/tracking.md."""
    section = (ROOT / "docs" / "tracking.md").read_text().partition(f"## {heading}\n")[2]
    rows = re.findall(r"^\|([^|]*)\|", section.partition("\n## ")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def unknown(names: Iterable[str], patterns: set[str]) -> set[str]:
    return {name for name in names if not any(fnmatchcase(name, p) for p in patterns)}


@pytest.mark.usefixtures("others")
class TestNames:
    """Every name that runs log is documented, and every documented name is logged."""

    def test_metrics(self, finished: Finished) -> None:
        logged = {name for run in finished.place.runs() for name in run.data.metrics}
        patterns = documented("Metrics")
        assert unknown(logged, patterns) == set()
        # so short a job may have no accuracies that differ, and no step that is sampled
        optional = {"relative_improvement_p_value", "system/*"}
        missing = {p for p in patterns - optional if not any(fnmatchcase(n, p) for n in logged)}
        assert missing == set()

    def test_parameters(self, finished: Finished) -> None:
        assert documented("Parameters") == {
            name for run in finished.place.runs() for name in run.data.params
        }

    def test_tags(self, finished: Finished) -> None:
        logged = {name for run in finished.place.runs() for name in run.data.tags}
        ours = {name for name in logged if not name.startswith("mlflow.")}
        assert unknown(ours, documented("Tags")) == set()

"""Jobs that are killed, stopped or broken: what their runs say, and how they go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import Finished
from jobs import ROOT, TRAINING, TRANSFER, Place, arguments, bits_of
from mlflow.tracking import MlflowClient
from PIL import Image

from nas.data import ImageTask
from nas.errors import NonFiniteLossError
from nas.randomness import derive_seed
from nas.training import Training, TrainingResult
from pipeline.cli import main
from pipeline.job import Job

PATIENCE = 120.0  # seconds; nothing here takes so long
RETRAIN = {**TRAINING, "architecture": "DARTS_V1", "channels": 2, "seeds": 2}


def wait_for_work(place: Place, process: BaseProcess) -> None:
    """Return when ``process`` is at work on some step, or has nothing left to do."""
    at_work = f"tags.`process.pid` = '{process.pid}' and tags.step != '' and status = 'RUNNING'"
    while not place.runs(at_work) and process.exitcode is None:
        time.sleep(0.05)
    assert process.exitcode in (None, 0)


def test_kills_at_random_moments_change_no_bit(place: Place, finished: Finished) -> None:
    moments = random.Random(2)
    killed = 0
    for longest in (1.5, 3.0, 3.0, 4.5, 6.0):
        process = place.start("transfer", TRANSFER)
        wait_for_work(place, process)
        process.join(moments.uniform(0, longest))
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert killed >= 3
    process = place.start("transfer", TRANSFER)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert "RUNNING" not in place.statuses()
    bits_of(place, place.jobs()[-1]).same_as(finished.bits)


def test_ctrl_c_marks_the_runs_and_the_job_goes_on(place: Place, finished: Finished) -> None:
    side_by_side = arguments({**TRANSFER, "parallel": 2})
    command = [sys.executable, "-m", "pipeline", "transfer", *side_by_side]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=place.environment,
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background may have it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE
    while len(place.runs("tags.step = 'train' and status = 'RUNNING'")) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert complaint.endswith("interrupted; start it again with the same options to go on\n")
    assert "Traceback" not in complaint
    assert place.jobs()[-1].info.status == "KILLED"
    assert [run.info.status for run in place.runs("tags.step = 'search'")] == ["FINISHED"]
    assert "KILLED" in {run.info.status for run in place.runs("tags.step = 'train'")}
    assert place.statuses() == {"KILLED", "FINISHED"}

    process = place.start("transfer", TRANSFER)
    process.join(PATIENCE)
    assert process.exitcode == 0
    last = place.jobs()[-1]
    assert last.info.status == "FINISHED"
    assert "reused.search" in last.data.tags
    bits_of(place, last).same_as(finished.bits)


def test_stopped_before_the_new_version_has_its_alias(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", stop)
        assert main(["retrain", *arguments({**RETRAIN, "seeds": 1})]) == 130
    (left,) = place.client.search_model_versions()
    assert not place.client.get_registered_model("nas-animals").aliases
    assert main(["retrain", *arguments({**RETRAIN, "seeds": 1})]) == 0
    (version,) = place.client.search_model_versions()
    assert version.source == left.source
    aliases = place.client.get_registered_model("nas-animals").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"champion": "1"}
    job = place.client.get_run(place.jobs()[-1].info.run_id)  # with its models
    assert (job.data.tags["model.version"], job.data.tags["model.alias"]) == ("1", "champion")
    (model,) = job.outputs.model_outputs
    assert version.source == f"models:/{model.model_id}"


def test_sigterm_stops_a_search(place: Place) -> None:
    process = place.start("search", {"source": "digits", "search_epochs": 500})
    wait_for_work(place, process)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 130
    assert place.statuses() == {"KILLED"}
    assert len(place.runs()) == 2


def diverge(monkeypatch: pytest.MonkeyPatch, seeds: set[int]) -> None:
    """Let the trainings from these seeds leave the finite numbers."""
    run = Training.run

    def run_or_diverge(self: Training, *given: object) -> TrainingResult:
        if self.seed in seeds:
            raise NonFiniteLossError("the loss is not finite (epoch 1, batch 3)")
        return run(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Training, "run", run_or_diverge)


def test_a_random_network_that_diverges_is_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverge(monkeypatch, {derive_seed(0, "random baseline", 0) % 2**31})
    assert main(["retrain", *arguments(RETRAIN)]) == 0
    assert "1 random network could not be trained: the loss is not finite" in (
        capsys.readouterr().out
    )
    job = place.jobs()[-1]
    assert job.info.status == "FINISHED"
    assert json.loads(job.data.tags["random.failed"]) == {
        "0": "the loss is not finite (epoch 1, batch 3)"
    }
    (failed,) = place.runs("status = 'FAILED'")
    assert failed.info.run_name == "train random 0 on animals"
    assert failed.data.tags["failure"].startswith("NonFiniteLossError: the loss is not finite")
    artifacts = place.enter().artifacts(job.info.run_id)
    rows = json.loads((artifacts / "comparison.json").read_text())["networks"]
    assert [row["label"] for row in rows] == [
        "transferred, seed 0",
        "transferred, seed 1",
        "random 1",
        "random 2",
    ]


def test_a_transferred_network_that_diverges_ends_the_job(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverge(monkeypatch, {1})
    assert main(["retrain", *arguments(RETRAIN)]) == 1
    complaint = capsys.readouterr().err
    assert complaint == "error: the loss is not finite (epoch 1, batch 3)\n"
    job = place.jobs()[-1]
    assert job.info.status == "FAILED"
    assert job.data.tags["failure"].startswith("NonFiniteLossError: the loss is not finite")
    assert "RUNNING" not in place.statuses()
    assert not place.client.search_registered_models()


def test_an_image_that_breaks_after_the_job_began(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set too large for memory is read while it is trained on."""
    folder = place.folder / "pets"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            rng = torch.Generator().manual_seed(100 * label + number)
            pixels = torch.randint(256, (10, 10), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    monkeypatch.setattr("nas.data.files.RESIDENT_BYTES", 0)
    load = Job.load

    def load_and_break(self: Job, *given: object) -> ImageTask:
        task = load(self, *given)  # type: ignore[arg-type]
        broken = Path(task.images.paths[int(task.splits.train[0])])  # type: ignore[attr-defined]
        broken.write_bytes(broken.read_bytes()[:60])
        return task

    monkeypatch.setattr(Job, "load", load_and_break)
    options = {"source": f"folder:{folder}", "search_epochs": 1, "search_cells": 3}
    assert main(["search", *arguments(options)]) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("error: the image cat/")
    assert "does not decode" in complaint
    assert place.statuses() == {"FAILED"}
    for run in place.runs():
        assert run.data.tags["failure"].startswith("DataError: the image cat/")
    assert len(place.runs()) == 2

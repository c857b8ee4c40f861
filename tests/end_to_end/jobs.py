"""Tiny jobs in a store of their own, and what is left of them, to be compared bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from torch import Tensor

from nas.checkpoint import load_checkpoint
from pipeline.registry import resolve
from pipeline.store import open_store
from pipeline.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "nas-transfer"
SEARCH = {
    "source": "digits",
    "source_limit": 300,
    "search_epochs": 2,
    "search_cells": 3,
    "search_channels": 4,
    "method": "darts",
}
TRAINING = {
    "target": "animals",
    "target_limit": 300,
    "target_size": 8,
    "cells": 3,
    "train_epochs": 1,
}
TRANSFER = {**SEARCH, **TRAINING, "channels": 4, "seeds": 2}

# Its server imports what takes long once; each job is then forked from it in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.cli", "mlflow.models", "mlflow.pytorch", "alembic"])


@dataclass(frozen=True)
class Place:
    """A folder with a store, its artifacts, and the home for work in progress."""

    folder: Path

    @staticmethod
    def make(folder: Path, empty_store: Path) -> Place:
        """A place with a copy of ``empty_store`` and an experiment that keeps its files here."""
        shutil.copy(empty_store, folder / "mlflow.db")
        place = Place(folder)
        place.client.create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())
        return place

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def variables(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
            "NAS_TRANSFER_HOME": str(self.folder / "home"),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def environment(self) -> dict[str, str]:
        """For a process: ours, with the place's variables and our interpreter first."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **self.variables, "PATH": path}

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def enter(self) -> Tracker:
        """Make this the store of the running process."""
        os.environ.update(self.variables)
        mlflow.set_tracking_uri(None)
        return Tracker(open_store())

    def runs(self, condition: str = "") -> list[Run]:
        """Runs of the store, the first first."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        found = self.client.search_runs(
            experiments, condition, order_by=["attributes.start_time ASC"]
        )
        return list(found)

    def jobs(self) -> list[Run]:
        """Runs that are nested in no other."""
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def statuses(self) -> set[str]:
        return {run.info.status for run in self.runs()}

    def mlflow_run(self, entry_point: str, parameters: Mapping[str, Any]) -> str:
        """`mlflow run`, as a user types it; returns what it prints."""
        assignments = [f"-P{name}={value}" for name, value in parameters.items()]
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry_point,
             "--env-manager", "local", *assignments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, entry_point: str, parameters: Mapping[str, Any]) -> BaseProcess:
        """The entry point in a process of its own, which ends with its exit code."""
        process = PROCESSES.Process(
            target=_job, args=(self, [entry_point, *arguments(parameters)]), daemon=False
        )
        process.start()
        return process


def arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as the command line takes them."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in parameters.items())
    return [text for pair in pairs for text in pair]


def _job(place: Place, command: list[str]) -> None:
    from pipeline.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(place.variables)
    os.chdir(place.folder)
    sys.exit(main(command))


@dataclass(frozen=True)
class Bits:
    """All that a transfer came to."""

    genotype: dict[str, Any]
    accuracies: dict[str, tuple[float, float]]  # label -> validation and test
    weights: dict[str, dict[str, Tensor]]  # label -> tensors
    probabilities: np.ndarray  # of the registered network

    def same_as(self, other: Bits) -> None:
        """Assert that ``other`` is the same, bit for bit."""
        assert self.genotype == other.genotype
        assert self.accuracies == other.accuracies
        assert self.weights.keys() == other.weights.keys()
        for label, tensors in self.weights.items():
            assert tensors.keys() == other.weights[label].keys()
            for name, tensor in tensors.items():
                assert tensor.equal(other.weights[label][name]), (label, name)
        np.testing.assert_array_equal(self.probabilities, other.probabilities)


def bits_of(place: Place, job: Run) -> Bits:
    """Read a finished transfer back from the store."""
    tracker = place.enter()
    artifacts = tracker.artifacts(job.info.run_id)
    rows = json.loads((artifacts / "comparison.json").read_text())["networks"]
    weights = {
        row["label"]: dict(
            load_checkpoint(tracker.artifacts(row["run"]) / "network.safetensors").tensors
        )
        for row in rows
    }
    tags = job.data.tags
    model = resolve(tracker, f"models:/{tags['model.name']}/{tags['model.version']}")
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 24, model.channels), dtype=np.uint8)
    return Bits(
        genotype=json.loads((artifacts / "genotype.json").read_text()),
        accuracies={
            row["label"]: (row["validation_accuracy"], row["test_accuracy"]) for row in rows
        },
        weights=weights,
        probabilities=model.predict(images),
    )

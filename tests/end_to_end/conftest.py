"""One finished tiny transfer, shared by the tests that look at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from jobs import TRANSFER, Bits, Place, bits_of
from mlflow.entities import Run

from pipeline.store import open_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated store; a copy of the file costs nothing, a migration seconds."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        patch.chdir(folder)
        open_store()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs in this process set the number of threads, and tests choose the store."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    mlflow.set_tracking_uri(None)


@pytest.fixture
def place(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty place, entered."""
    made = Place.make(tmp_path, empty_store)
    monkeypatch.chdir(tmp_path)
    made.enter()
    return made


@dataclass(frozen=True)
class Finished:
    """A transfer that `mlflow run` ran undisturbed."""

    place: Place
    output: str
    job: Run
    bits: Bits


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Finished:
    place = Place.make(tmp_path_factory.mktemp("finished"), empty_store)
    output = place.mlflow_run("main", TRANSFER)
    (job,) = place.jobs()
    job = place.client.get_run(job.info.run_id)  # with its models, which a search leaves out
    return Finished(place, output, job, bits_of(place, job))


@pytest.fixture
def children(finished: Finished) -> Callable[[str], list[Run]]:
    """The nested runs of the transfer, by their step."""

    def of(step: str) -> list[Run]:
        parent = f"tags.`mlflow.parentRunId` = '{finished.job.info.run_id}'"
        return finished.place.runs(f"{parent} and tags.step = '{step}'")

    return of

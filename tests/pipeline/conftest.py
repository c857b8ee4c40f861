"""A tracking store of its own for each test, without a migration each time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from workplace import VARIABLES, Workplace

from pipeline.store import open_store
from pipeline.tracking import RunLog, Tracker, connect


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; its migration costs seconds, a copy of the file nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        # An experiment keeps the folder of its artifacts: the tests make their own ones.
        patch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        open_store()
    return path


@pytest.fixture
def workplace(
    tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Workplace:
    """The test's working directory, store, and home for work in progress, all new."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    place = Workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in place.variables.items():
        monkeypatch.setenv(name, value)
    return place


@pytest.fixture
def tracker(workplace: Workplace) -> Tracker:
    """The experiment of an empty store."""
    return connect()


@pytest.fixture
def log(tracker: Tracker) -> Iterator[RunLog]:
    """A run of a job."""
    with tracker.open_run("transfer") as log:
        yield log

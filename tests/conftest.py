"""What every test gets: one thread, and no way to reach a user's own tracking store or cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch

from nas.data import ImageTask, load_task
from nas.ops import build
from nas.ops.backend import choose

BEGUN_FIRST = "test_cuda_build.py"  # the longest file: at the end a single core would wait for it
RUN_VARIABLES = (
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != BEGUN_FIRST)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("NAS_TRANSFER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    """200 real 8x8 digits: enough to step on, too few to wait for."""
    return load_task("digits", root=tmp_path_factory.mktemp("unused"), limit=200)


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    """All 1,797 real 8x8 digits: enough to learn from in seconds."""
    return load_task("digits", root=tmp_path_factory.mktemp("unused"))


@pytest.fixture(scope="session")
def native() -> None:
    """Skips, with the reason, where there are no native kernels."""
    extension = build.load()
    if extension.module is None:
        pytest.skip(f"no native kernels: {extension.reason}")
    choose("native")


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    if request.param == "native":
        request.getfixturevalue("native")
    return str(request.param)

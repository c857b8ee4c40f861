"""A working directory with a tracking store, and processes that can be killed in it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Its server imports what takes long once; each process is then forked from it in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "mlflow.models", "mlflow.system_metrics", "alembic"])

VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "NAS_TRANSFER_HOME",
)


@dataclass(frozen=True)
class Workplace:
    """``folder`` holds the store ``mlflow.db`` and the home for work in progress."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "NAS_TRANSFER_HOME": str(self.folder / "home"),
        }

    def start(self, function: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Run ``function`` of a test module in a process that has this workplace."""
        process = PROCESSES.Process(target=_enter, args=(self, function, arguments))
        process.start()
        return process


def _enter(place: Workplace, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(place.variables)
    os.chdir(place.folder)
    function(*arguments)

"""What all entry points share: the run they log to, the machine they use, the data they load."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nas.data import ImageTask, load_task
from nas.hardware import pick_device
from nas.observer import EpochRecord, Observer
from nas.ops.backend import AUTO, FLOAT32
from nas.search.replay import OFF
from pipeline.console import Observers, ProgressObserver, counting, say
from pipeline.settings import DataSettings
from pipeline.steps import home
from pipeline.team import Team
from pipeline.tracking import RunLog, Tracker, connect


@dataclass(frozen=True)
class Machine:
    """Where and how a job runs; nothing here changes its result by more than rounding.

    Attributes:
        device: "auto", "cpu" or "cuda[:N]".
        workers: processes that decode the images of a set too large for memory.
        parallel: networks trained side by side; None is one a core, and one at a time on a GPU.
        threads: cores that a single step uses; None leaves it to PyTorch.
        data: folder of downloaded data sets; None is a folder of the user's cache.
        fresh: never reuse a finished step or go on with a killed one.
        options: of the command line, to be logged as parameters of the run.
        backend: of a search: "auto", "native" or "eager" (:mod:`nas.ops.backend`).
        storage: of a search's images between its cells: "float32" or "bfloat16".
        cuda_graphs: whether a search may replay its steps from CUDA graphs: "auto" or "off".
    """

    device: str = "auto"
    workers: int = 0
    parallel: int | None = None
    threads: int | None = None
    data: Path | None = None
    fresh: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    backend: str = AUTO
    storage: str = FLOAT32
    cuda_graphs: str = OFF


@dataclass(frozen=True)
class Job:
    """One run of an entry point."""

    log: RunLog
    machine: Machine
    device: torch.device
    team: Team

    def load(self, settings: DataSettings) -> ImageTask:
        """Load a data set and say what it is."""
        name = settings.name
        with counting(f"reading {name}") as progress:
            task = load_task(
                name,
                root=self.machine.data or home() / "data",
                image_size=settings.image_size,
                largest=settings.largest,
                limit=settings.limit,
                progress=progress,
                observer=RunObserver(self.log),
            )
        shape, splits = task.shape, task.splits
        say(
            f"{name}: {len(task.labels):,} images of {shape.height}x{shape.width}x"
            f"{shape.channels}, {shape.classes} classes, train/val/test {len(splits.train):,}/"
            f"{len(splits.val):,}/{len(splits.test):,}"
        )
        return task


@contextmanager
def open_job(
    name: str, machine: Machine, params: Mapping[str, Any], tags: Mapping[str, Any]
) -> Iterator[Job]:
    """Open the parent run of an entry point.

    Raises:
        ConfigurationError: the device is not there.
        TrackingError: the tracking store cannot be used.
    """
    device = pick_device(machine.device)
    home()  # a folder that cannot be made is known before a run is opened
    one_a_core = torch.get_num_threads() if device.type == "cpu" else 1
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    team = Team(machine.parallel or one_a_core)
    with connect().open_run(name, tags=tags) as log, team:
        log.log_params({**machine.options, **params})
        yield Job(log, machine, device, team)


class RunObserver(Observer):
    """Logs every epoch, and every warning as a tag of the run."""

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_resume(self, records: Sequence[EpochRecord]) -> None:
        # A kill may have come between a checkpoint and its log, or the run be a new one.
        for record in records:
            self.on_epoch(record)

    def on_epoch(self, record: EpochRecord) -> None:
        self.log.log_metrics(record.metrics, step=record.epoch)

    def on_warning(self, tag: str, message: str) -> None:
        self.log.set_tags({f"warning.{tag}": message})


@contextmanager
def watched(title: str, log: RunLog, *more: Observer) -> Iterator[Observer]:
    """An observer that shows progress and logs to ``log``."""
    with ProgressObserver(title) as progress:
        yield Observers(RunObserver(log), progress, *more)


def flat(prefix: str, config: Any) -> dict[str, Any]:
    """The fields of a dataclass as parameters: "<prefix>.<field>", nested ones in dots."""
    values: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else asdict(config)).items():
        if isinstance(value, dict):
            values |= flat(f"{prefix}.{name}", value)
        else:
            values[f"{prefix}.{name}"] = value
    return values


def ui_command(tracker: Tracker) -> str:
    """What opens the MLflow UI on this store."""
    if tracker.uri.startswith(("http://", "https://")):
        return f"a browser at {tracker.uri}"
    program = Path(sys.executable).parent / "mlflow"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program} ui --backend-store-uri {tracker.uri}"

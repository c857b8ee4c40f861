"""Everything the project says to MLflow tracking, on a store that store.py opened.

A :class:`Tracker` is one experiment of one store; a :class:`RunLog` is one run of it. Both use
explicit run ids, never MLflow's fluent state, so threads and nested runs cannot mix them up.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from mlflow.artifacts import download_artifacts
from mlflow.entities import (
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from nas.errors import TrackingError
from pipeline.afterwards import insist_on_killed
from pipeline.inputs import DatasetSummary, dataset_input, datasets_of
from pipeline.process import SET_BY_MLFLOW, Process, interruptible, standard_tags
from pipeline.store import Store, open_store, reason_of, without_password

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nas.data.task import ImageTask

FAILURE = "failure"  # the tag that says why a run did not finish
SYSTEM_METRICS_SECONDS = 5
# MLflow's limits on one value and on one batch.
PARAM_LENGTH, TAG_LENGTH = 6000, 8000
PARAMS_A_BATCH, METRICS_A_BATCH = 100, 1000
# How MLflow says that it has no run of some id.
UNKNOWN_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# What MLflow calls a run that nobody named, e.g. "nimble-fox-123".
RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")


# Matplotlib's parser of mathematical text is shared by all threads and bears only one.
DRAWING = threading.Lock()

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class RunSummary:
    """A run as the store has it. ``ended`` is None until it has ended once."""

    run_id: str
    name: str
    status: str
    ended: datetime | None
    parent_id: str | None
    tags: Mapping[str, str]
    datasets: tuple[DatasetSummary, ...]


class RunLog:
    """One run of the store. Every method raises TrackingError when the store refuses."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.tracker = tracker
        self.run_id = run_id

    @property
    def _client(self) -> MlflowClient:
        return self.tracker.client

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log ``params``. A parameter the run has already keeps its value: MLflow never changes
        one, and `mlflow run` has written the command line's before the job starts."""
        with self.tracker.reported("log parameters"):
            known = self._client.get_run(self.run_id).data.params
            new = [
                Param(name, trim(value, PARAM_LENGTH))
                for name, value in params.items()
                if name not in known
            ]
            for batch in _batches(new, PARAMS_A_BATCH):
                self._client.log_batch(self.run_id, params=batch)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log all ``metrics`` at ``step`` in one call; NaN and infinity are kept as they are."""
        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with self.tracker.reported("log metrics"):
            for batch in _batches(entries, METRICS_A_BATCH):
                self._client.log_batch(self.run_id, metrics=batch)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set ``tags``, replacing those of the same name."""
        entries = [RunTag(name, trim(value, TAG_LENGTH)) for name, value in tags.items()]
        with self.tracker.reported("set tags"):
            for batch in _batches(entries, PARAMS_A_BATCH):
                self._client.log_batch(self.run_id, tags=batch)

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows above everything else."""
        self.set_tags({MLFLOW_RUN_NOTE: markdown})

    def tags(self) -> dict[str, str]:
        """The run's tags as the store has them now."""
        with self.tracker.reported("read a run"):
            return dict(self._client.get_run(self.run_id).data.tags)

    def log_figure(self, figure: Figure, path: str) -> None:
        """Log a matplotlib figure as the artifact ``path``, e.g. "cells.png"."""
        with self.tracker.reported(f"keep {path}"), DRAWING:
            self._client.log_figure(self.run_id, figure, path)

    def log_json(self, value: Mapping[str, Any], path: str) -> None:
        """Log a JSON-able value as the artifact ``path``."""
        self.log_text(json.dumps(value, indent=2), path)

    def log_text(self, text: str, path: str) -> None:
        """Log ``text`` as the artifact ``path``."""
        with self.tracker.reported(f"keep {path}"):
            self._client.log_text(self.run_id, text, path)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or what is in a folder, under ``folder`` of the run's artifacts."""
        with self.tracker.reported(f"keep {path.name}"):
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self.run_id, str(path), folder)

    def log_dataset(self, task: ImageTask, context: str) -> None:
        """Log ``task`` as a data-set input of the run, as "source" or "target"."""
        with self.tracker.reported("log a data set"):
            self._client.log_inputs(self.run_id, datasets=[dataset_input(task, context)])

    def log_datasets_of(self, run_id: str) -> None:
        """Log the data-set inputs of the run ``run_id`` as inputs of this one."""
        with self.tracker.reported("log a data set"):
            inputs = self._client.get_run(run_id).inputs
            self._client.log_inputs(self.run_id, datasets=inputs.dataset_inputs if inputs else [])

    def log_output_model(self, name: str, path: Path) -> str:
        """Keep a file or a folder as a logged model that this run made; returns the model's id.

        Later runs can name it as an input, which draws the line between them in the UI.
        """
        with self.tracker.reported(f"keep {path.name}"):
            client = self._client
            experiment_id = client.get_run(self.run_id).info.experiment_id
            model = client.create_logged_model(
                experiment_id, name, source_run_id=self.run_id, model_type=name
            )
            keep = client.log_model_artifacts if path.is_dir() else client.log_model_artifact
            keep(model.model_id, str(path))
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
            return str(model.model_id)

    def log_model_output(self, model_id: str) -> None:
        """Log a logged model, made by this run or a step of it or taken over, as its output.

        One that it has already is left alone: MLflow refuses to have it twice.
        """
        with self.tracker.reported("log a model"):
            outputs = self._client.get_run(self.run_id).outputs
            known = outputs.model_outputs if outputs else []
            if model_id not in {model.model_id for model in known}:
                self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])

    def log_model_input(self, model_id: str) -> None:
        """Log a logged model as an input of the run."""
        with self.tracker.reported("log a model"):
            self._client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])


class Tracker:
    """One experiment of one tracking store; made by :func:`connect`."""

    def __init__(self, store: Store) -> None:
        self.client = store.client
        self.experiment_id = store.experiment_id
        self._inherited = store.inherited_run

    @property
    def uri(self) -> str:
        """The store's address without any password in it."""
        return without_password(self.client.tracking_uri)

    @contextmanager
    def reported(self, what: str) -> Iterator[None]:
        """Turn a failure of the store inside this block into a TrackingError of one sentence."""
        try:
            yield
        except (MlflowException, OSError) as error:
            raise TrackingError(f"{self.uri} did not {what}: {reason_of(error)}") from error

    @contextmanager
    def open_run(
        self,
        name: str,
        *,
        parent: RunLog | None = None,
        tags: Mapping[str, Any] | None = None,
        resume: str | None = None,
    ) -> Iterator[RunLog]:
        """Open a run, and close it with the status that tells how the block ended.

        FINISHED on normal exit; KILLED on Ctrl-C and SIGTERM; FAILED with the tag ``failure`` on
        any other exception, which goes on up. Without ``parent`` this is the job's own run: it
        takes over the run that `mlflow run` opened for this process, and turns SIGTERM into
        :class:`~pipeline.process.Interrupted`.

        Args:
            resume: the id of an interrupted run to go on with instead of opening a new one.
        """
        inherited = self._inherited if parent is None and resume is None else None
        if inherited:
            resume, self._inherited = inherited, None
        with interruptible() if parent is None else nullcontext():
            all_tags = standard_tags() | dict(tags or {})
            if parent is not None:
                all_tags[MLFLOW_PARENT_RUN_ID] = parent.run_id
            log = self._reopen(resume, name, all_tags) if resume else self._create(name, all_tags)
            try:
                # Of steps only: in a job they would be the first thing that a comparison shows.
                with self._system_metrics(log.run_id) if parent is not None else nullcontext():
                    yield log
                self._end(log.run_id, "FINISHED")
            except KeyboardInterrupt as stop:
                # A query that the signal broke off would hold its lock on a SQLite file for as
                # long as the traceback holds its cursor.
                clear_frames(stop.__traceback__)
                with suppress(TrackingError):
                    self._end(log.run_id, "KILLED")
                if inherited:
                    insist_on_killed(self.client.tracking_uri, inherited)
                raise
            except BaseException as error:
                with suppress(TrackingError):
                    log.set_tags({FAILURE: f"{type(error).__name__}: {error}"[:500]})
                    self._end(log.run_id, "FAILED")
                raise

    def reap_dead_runs(self) -> list[str]:
        """Mark as KILLED every run of this host whose process is gone, and return their ids.

        Runs of living processes, of other hosts and of other programs are left alone.
        """
        host = Process.current().host
        running = f"attributes.status = 'RUNNING' and tags.`process.host` = '{host}'"
        reaped = []
        for run in self._search(running):
            process = Process.from_tags(run.tags)
            if process is not None and not process.lives():
                RunLog(self, run.run_id).set_tags({FAILURE: "process vanished"})
                self._end(run.run_id, "KILLED")
                reaped.append(run.run_id)
        return reaped

    def run(self, run_id: str) -> RunSummary | None:
        """The run ``run_id``; None where the store has it no more."""
        with self.reported("read a run"):
            try:
                return summarise(self.client.get_run(run_id))
            except MlflowException as error:
                if error.error_code in UNKNOWN_RUN:
                    return None
                raise

    def children(self, run_id: str) -> list[RunSummary]:
        """The runs nested in ``run_id``, the first first."""
        return self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'")[::-1]

    def find_finished(self, step: str, digest: str) -> RunSummary | None:
        """The latest finished run of ``step`` with this digest of its inputs."""
        return self._find(step, digest, ("FINISHED",))

    def find_interrupted(self, step: str, digest: str) -> RunSummary | None:
        """The latest run of ``step`` with this digest that was killed or failed."""
        return self._find(step, digest, ("KILLED", "FAILED"))

    def artifacts(self, run_id: str) -> Path:
        """A local folder with the run's artifacts, to be read only.

        It is the store's own folder where that is on this machine, else a copy that goes with
        this process.
        """
        with self.reported(f"give the artifacts of run {run_id}"):
            location = self.client.get_run(run_id).info.artifact_uri
            return Path(self.client.download_artifacts(run_id, "", _copy_of(location)))

    def model_files(self, model_id: str) -> Path:
        """A local folder with the files of a logged model, as :meth:`artifacts` of a run."""
        with self.reported(f"give the files of the model {model_id}"):
            location = self.client.get_logged_model(model_id).artifact_location
            uri = self.client.tracking_uri
            copy = _copy_of(location)
            return Path(download_artifacts(artifact_uri=location, dst_path=copy, tracking_uri=uri))

    def _create(self, name: str, tags: Mapping[str, str]) -> RunLog:
        with self.reported("open a run"):
            run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
        return RunLog(self, run.info.run_id)

    def _reopen(self, run_id: str, name: str, tags: Mapping[str, str]) -> RunLog:
        log = RunLog(self, run_id)
        with self.reported(f"open run {run_id} again"):
            run = self.client.get_run(run_id)
            # The tags say that this process owns the run: first, or it could be reaped as dead.
            kept = {tag for tag in run.data.tags if tag.startswith(SET_BY_MLFLOW)}
            log.set_tags({name: value for name, value in tags.items() if name not in kept})
            if FAILURE in run.data.tags:
                self.client.delete_tag(run_id, FAILURE)
            new_name = name if RANDOM_NAME.fullmatch(run.info.run_name or "") else None
            self.client.update_run(run_id, status="RUNNING", name=new_name)
        return log

    def _end(self, run_id: str, status: str) -> None:
        with self.reported(f"mark run {run_id} as {status}"):
            self.client.set_terminated(run_id, status)

    def _find(self, step: str, digest: str, statuses: tuple[str, ...]) -> RunSummary | None:
        runs = self._search(f"tags.step = '{step}' and tags.`step.digest` = '{digest}'")
        return next((run for run in runs if run.status in statuses), None)

    def _search(self, condition: str) -> list[RunSummary]:
        """Runs of the experiment, the last one first."""
        runs: list[RunSummary] = []
        token = None
        with self.reported("search its runs"):
            while True:
                page = self.client.search_runs(
                    [self.experiment_id],
                    condition,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
                runs.extend(map(summarise, page))
                token = page.token
                if not token:
                    return runs

    @contextmanager
    def _system_metrics(self, run_id: str) -> Iterator[None]:
        """Sample the machine while the block runs; trouble with that never reaches the job."""
        monitor = None
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() != "false":
            with suppress(Exception):
                monitor = SystemMetricsMonitor(
                    run_id,
                    sampling_interval=SYSTEM_METRICS_SECONDS,
                    resume_logging=True,
                    tracking_uri=self.client.tracking_uri,
                )
                monitor.start()
        try:
            yield
        finally:
            if monitor is not None:
                with suppress(Exception):
                    monitor.finish()


def connect() -> Tracker:
    """The experiment to log into; see :func:`pipeline.store.open_store` for how it is found.

    Runs that a vanished process of this host left behind are marked as KILLED.

    Raises:
        TrackingError: within seconds, when the store cannot be used.
    """
    tracker = Tracker(open_store())
    tracker.reap_dead_runs()
    return tracker


def summarise(run: Run) -> RunSummary:
    """A run of MLflow's in the project's terms."""
    tags, end = dict(run.data.tags), run.info.end_time
    return RunSummary(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        ended=datetime.fromtimestamp(end / 1000) if end else None,
        parent_id=tags.get(MLFLOW_PARENT_RUN_ID),
        tags=tags,
        datasets=datasets_of(run),
    )


def _copy_of(location: str) -> str | None:
    """Where files at ``location`` are copied to; None where they are on this machine."""
    is_here = urlsplit(location).scheme in ("", "file")
    return None if is_here else tempfile.mkdtemp(dir=_downloads().name)


@cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    """Copies of remote artifacts; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="nas-transfer-")


def trim(value: Any, length: int) -> str:
    """``value`` as text of at most ``length`` characters; an ellipsis shows that it was cut."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _batches(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    for start in range(0, len(entries), size):
        yield list(entries[start : start + size])

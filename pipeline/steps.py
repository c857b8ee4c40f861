"""Resumable steps: what is finished is reused, what was killed goes on from its checkpoint.

A step is named by a digest of its inputs and of the library's code. While it runs it owns a work
folder on this machine, which outlives SIGKILL; once it is finished everything lives in its MLflow
run and the folder goes. The run's status is set last, so a finished run has all its artifacts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import nas
from nas.checkpoint import write_atomically
from nas.errors import ConfigurationError, NASError, TrackingError
from pipeline.process import Process
from pipeline.tracking import RunLog, RunSummary, Tracker

RESULTS = "results.json"
FILES = "files.json"  # every artifact of the step and its size in bytes
# Worker processes of a killed job keep its lock for a moment, until they see that it is gone.
ORPHAN_SECONDS = 15.0
# Steps that run side by side add to the same tag of their parent.
TAGGING = threading.Lock()


@dataclass(frozen=True)
class StepOutcome:
    """A finished step.

    Attributes:
        directory: the step's artifacts, to be read only.
        results: what the step's body returned, read back from JSON.
        reused: whether an earlier run did the work.
    """

    run_id: str
    directory: Path
    results: Mapping[str, Any]
    reused: bool


@dataclass(frozen=True)
class StepRun:
    """What a step's body sees.

    Attributes:
        log: the step's own run.
        directory: empty at the start; every file left here becomes an artifact of the run.
        checkpoint: where the body keeps its checkpoint; it is there when the body goes on.
    """

    log: RunLog
    directory: Path
    checkpoint: Path


@dataclass(frozen=True)
class _Work:
    """The work folder of one step."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def lock(self) -> Path:
        # Beside the folder: a lock that is removed with it could be held twice.
        return self.folder.with_name(f"{self.folder.name}.lock")


def run_step(
    name: str,
    title: str,
    inputs: Mapping[str, Any],
    body: Callable[[StepRun], Mapping[str, Any]],
    *,
    parent: RunLog,
    fresh: bool = False,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> StepOutcome:
    """Run ``body`` as a nested run of ``parent``, unless a finished run has the same inputs.

    Args:
        name: the kind of step, e.g. "search"; becomes the tag ``step``.
        title: for people, e.g. "search on animals"; becomes the run's name.
        inputs: JSON-able values that decide the result, with the digests of data and of the steps
            before; two steps of equal name, inputs and library code are the same step.
        body: does the work and returns the JSON-able results. It goes on from
            ``StepRun.checkpoint`` if that file exists.
        fresh: never reuse or go on.

    Raises:
        ConfigurationError: an input is not JSON.
        NASError: a living process is at work on the same step.
        TrackingError: the store refuses.
    """
    digest = step_digest(name, inputs)
    work = _Work(home() / "steps" / f"{name}-{digest[:16]}")
    if not fresh and (outcome := _reuse(name, digest, title, parent, say)) is not None:
        _clear_leftovers(work, title)
        return outcome
    with locked(work.lock, title):
        if fresh:
            shutil.rmtree(work.folder, ignore_errors=True)
        interrupted = _find_interrupted(name, digest, title, work, parent, say)
        shutil.rmtree(work.out, ignore_errors=True)
        work.out.mkdir(parents=True)
        with parent.tracker.open_run(
            title,
            parent=parent,
            tags={**(tags or {}), "step": name, "step.digest": digest},
            resume=interrupted.run_id if interrupted else None,
        ) as log:
            log.log_params(params or {})
            results = body(StepRun(log, work.out, work.checkpoint))
            _write_results(work.out, results)
            log.log_artifact(work.out)
        shutil.rmtree(work.folder, ignore_errors=True)
    directory = parent.tracker.artifacts(log.run_id)
    return StepOutcome(log.run_id, directory, _read_json(directory / RESULTS), reused=False)


def step_digest(name: str, inputs: Mapping[str, Any]) -> str:
    """The name of a step by content: 64 hex digits over its name, inputs and the library's code.

    Raises:
        ConfigurationError: an input is not JSON, or is NaN or infinite.
    """
    for key, value in inputs.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the input '{key}' of the step '{name}' must be JSON with finite numbers: {error}"
            ) from error
    text = json.dumps([name, dict(inputs), code_digest()], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest() -> str:
    """64 hex digits over every Python file of the library; constant while the process runs."""
    root = Path(nas.__file__).parent
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        state.update(f"{path.relative_to(root).as_posix()}:{content};".encode())
    return state.hexdigest()


def home() -> Path:
    """Where work in progress is kept: NAS_TRANSFER_HOME, else the user's cache folder.

    Raises:
        ConfigurationError: the folder cannot be made.
    """
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("NAS_TRANSFER_HOME") or cache_folder / "nas-transfer")
    try:
        (folder / "steps").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the folder {folder} for work in progress ({error.strerror}): set "
            "NAS_TRANSFER_HOME to one that can be written"
        ) from error
    return folder.absolute()


def read_outcome(tracker: Tracker, past: RunSummary) -> StepOutcome | None:
    """The outcome that ``past`` left in the store; None unless every file of it is there."""
    try:
        directory = tracker.artifacts(past.run_id)
        sizes = _read_json(directory / FILES)
        if any((directory / path).stat().st_size != size for path, size in sizes.items()):
            return None
        return StepOutcome(past.run_id, directory, _read_json(directory / RESULTS), reused=True)
    except (TrackingError, OSError, ValueError):
        return None


def _reuse(
    name: str, digest: str, title: str, parent: RunLog, say: Callable[[str], None]
) -> StepOutcome | None:
    past = parent.tracker.find_finished(name, digest)
    if past is None:
        return None
    outcome = read_outcome(parent.tracker, past)
    if outcome is None:
        say(f"running {title} again: run {past.run_id[:8]} finished it, but its files are gone")
        return None
    ended = f"{past.ended:%Y-%m-%d %H:%M}" if past.ended else "earlier"
    say(f"reusing {title} (run {past.run_id[:8]}, finished {ended})")
    tag = f"reused.{name}"
    with TAGGING:
        known = parent.tags().get(tag, "").split(",")
        parent.set_tags({tag: ",".join(dict.fromkeys(filter(None, [*known, past.run_id])))})
    return outcome


def _find_interrupted(
    name: str, digest: str, title: str, work: _Work, parent: RunLog, say: Callable[[str], None]
) -> RunSummary | None:
    """The run to go on with; None where there is no checkpoint, or only the checkpoint is left."""
    if not work.checkpoint.exists():
        return None
    interrupted = parent.tracker.find_interrupted(name, digest)
    run = f" (run {interrupted.run_id[:8]})" if interrupted else ""
    say(f"continuing {title} from its checkpoint{run}")
    return interrupted


def _write_results(out: Path, results: Mapping[str, Any]) -> None:
    write_atomically(out / RESULTS, json.dumps(dict(results), indent=2).encode())
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in files}
    write_atomically(out / FILES, json.dumps(sizes, indent=2).encode())


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _clear_leftovers(work: _Work, title: str) -> None:
    """Remove what a step left that was killed after its run was marked as finished."""
    if work.folder.exists():
        with suppress(NASError), locked(work.lock, title):
            shutil.rmtree(work.folder, ignore_errors=True)


@contextmanager
def locked(path: Path, title: str) -> Iterator[None]:
    """Hold the lock file ``path``.

    Raises:
        NASError: a living process holds it.
    """
    with open(path, "a+") as file:
        _acquire(file, title)
        try:
            file.truncate(0)
            file.write(json.dumps(asdict(Process.current())))
            file.flush()
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _acquire(file: IO[str], title: str) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(file)
        elsewhere = holder is not None and holder.host != Process.current().host
        if (holder and (elsewhere or holder.lives())) or time.monotonic() > deadline:
            who = f"process {holder.pid} on {holder.host}" if holder else "another process"
            raise NASError(f"{title} is being run by {who}: wait for it, or stop it") from None
        time.sleep(0.1)


def _holder(file: IO[str]) -> Process | None:
    file.seek(0)
    try:
        return Process(**json.loads(file.read()))
    except (ValueError, TypeError):  # it has the lock but has not signed yet
        return None

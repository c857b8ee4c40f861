"""What this process is, whether another one still lives, and how a signal reaches the job."""

from __future__ import annotations

import getpass
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import psutil
import torch
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

import nas

# Start times come from the kernel's boot clock, which time synchronisation moves a little.
START_TOLERANCE_SECONDS = 2.0
# `mlflow run` answers a terminal's Ctrl-C, which this process also got, with a SIGTERM of its own.
SECOND_SIGNAL_SECONDS = 5.0
# What `mlflow run` tells of a run better than this process can.
SET_BY_MLFLOW = (MLFLOW_USER, "mlflow.source.")


class Interrupted(KeyboardInterrupt):
    """SIGTERM, raised in the main thread so that it ends a run the way Ctrl-C does."""


@dataclass(frozen=True)
class Process:
    """A process, by what stays true when its number is given to another one.

    Attributes:
        started: seconds since the epoch.
    """

    host: str
    pid: int
    started: float

    @staticmethod
    def current() -> Process:
        """The running process."""
        process = psutil.Process()
        return Process(socket.gethostname(), process.pid, process.create_time())

    @staticmethod
    def from_tags(tags: Mapping[str, str]) -> Process | None:
        """The process that :func:`standard_tags` wrote into ``tags``; None if it did not."""
        try:
            pid, started = int(tags["process.pid"]), float(tags["process.started"])
            return Process(tags["process.host"], pid, started)
        except (KeyError, ValueError):
            return None

    def lives(self) -> bool:
        """Whether this very process runs on this host; False for a reused process number."""
        try:
            process = psutil.Process(self.pid)
            near = abs(process.create_time() - self.started) < START_TOLERANCE_SECONDS
            return near and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise once in the main thread, and leave time to clean up.

    A second signal within SECOND_SIGNAL_SECONDS is ignored, later ones raise again. A signal that
    was ignored before (as SIGINT is in a background job) stays ignored. Elsewhere than in the main
    thread this does nothing, since Python delivers signals there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last_raised = -SECOND_SIGNAL_SECONDS

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal last_raised
        now = time.monotonic()
        if now - last_raised < SECOND_SIGNAL_SECONDS:
            return
        last_raised = now
        raise Interrupted("stopped by SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt

    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@cache
def git_commit() -> str | None:
    """The commit that the library's files belong to; None for an installed copy."""
    folder = Path(nas.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy inside some other project's environment must not claim that project's commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("rev-parse", "HEAD")


@cache
def describe_device() -> str:
    """The accelerator's name, or how many threads of the CPU torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def standard_tags() -> dict[str, str]:
    """The tags of every run: who, which process, on what device, from which commit."""
    process = Process.current()
    tags = {
        MLFLOW_USER: _user(),
        MLFLOW_SOURCE_NAME: Path(sys.argv[0]).name or "python",
        MLFLOW_SOURCE_TYPE: "LOCAL",
        "device": describe_device(),
        "process.host": process.host,
        "process.pid": str(process.pid),
        "process.started": repr(process.started),
    }
    commit = git_commit()
    return tags | {MLFLOW_GIT_COMMIT: commit} if commit else tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"

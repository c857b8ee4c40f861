"""Independent steps side by side.

A small network keeps no two cores busy: its operations are over before the second one has begun.
Two trainings with a core each finish in half the time. They are threads, since PyTorch computes
outside Python's lock, so a run's log, progress and Ctrl-C work as if there were one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

from nas.observer import BatchEvent, Observer
from pipeline.process import Interrupted

WAIT_SECONDS = 0.5

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team:
    """Runs functions on ``size`` threads that share the cores PyTorch was given."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._first_error: BaseException | None = None
        threads = max(1, torch.get_num_threads() // size)
        self._pool = ThreadPoolExecutor(
            size, thread_name_prefix="step", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=error is not None)

    def start(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> list[Future[Result]]:
        """Begin ``function`` on every item, in order as threads come free."""
        return [self._pool.submit(self._run, function, item) for item in items]

    def finish(self, futures: Sequence[Future[Result]]) -> list[Result]:
        """Wait for ``futures``; the first error stops the others and goes on up."""
        try:
            # Not for ever: a signal that comes just before a wait is seen only after it.
            while wait(futures, timeout=WAIT_SECONDS).not_done:
                pass
            return [future.result() for future in futures]
        except BaseException as error:
            first = self._first_error or error  # the others only tell that they were stopped
            self._stop.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise first from None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of ``function`` for every item, in their order."""
        return self.finish(self.start(function, items))

    def _run(self, function: Callable[[Item], Result], item: Item) -> Result:
        """``function(item)``; an error stops the whole team at once, not when it is waited for."""
        if self._stop.is_set():
            raise Interrupted
        try:
            return function(item)
        except BaseException as error:
            with self._lock:
                self._first_error = self._first_error or error
            self._stop.set()
            raise

    @property
    def observer(self) -> Observer:
        """Ends a loop of this team after its batch, once the team is told to stop."""
        return _StopObserver(self._stop)


class _StopObserver(Observer):
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def on_batch(self, event: BatchEvent) -> None:
        if self._stop.is_set():
            raise Interrupted

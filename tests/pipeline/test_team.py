"""Steps side by side: their order, their errors, their threads, and how they are stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from nas.errors import DataError
from nas.observer import BatchEvent
from pipeline.process import Interrupted, interruptible
from pipeline.team import Team

EVENT = BatchEvent("training", 0, 1, 1, 1, 1, 0.0, 0.0)
LONG = 30.0  # seconds; what is stopped never takes so long


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Loops:
    """Loops that would run for LONG and note how they ended."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.started = threading.Semaphore(0)
        self.stopped: list[int] = []

    def run(self, number: int) -> None:
        observer = self.team.observer
        self.started.release()
        deadline = time.monotonic() + LONG
        try:
            while time.monotonic() < deadline:
                time.sleep(0.005)
                observer.on_batch(EVENT)
        except Interrupted:
            self.stopped.append(number)
            raise


def test_results_come_in_the_order_of_the_items() -> None:
    ended: list[int] = []

    def wait(number: int) -> int:
        time.sleep(0.1 * (3 - number))
        ended.append(number)
        return 10 * number

    with Team(3) as team:
        assert team.map(wait, range(3)) == [0, 10, 20]
    assert ended == [2, 1, 0]


def test_as_many_run_side_by_side_as_the_team_is_large() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1

    with Team(2) as team:
        team.map(work, range(6))
    assert most == 2


def test_a_team_of_one_goes_one_by_one_in_order() -> None:
    seen: list[int] = []
    with Team(1) as team:
        first = team.start(seen.append, range(3))
        team.map(seen.append, range(3, 5))
        team.finish(first)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("size", "each"), [(1, 4), (2, 2), (3, 1), (8, 1)])
@pytest.mark.usefixtures("four_threads")
def test_the_cores_are_divided(size: int, each: int) -> None:
    with Team(size) as team:
        assert team.map(lambda _: torch.get_num_threads(), range(size)) == [each] * size


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_error_stops_the_others_at_once(failing: int) -> None:
    """Also where an item before the failing one is still at work, and is waited for first."""

    def work(number: int) -> None:
        if number == failing:
            assert loops.started.acquire(timeout=LONG)
            raise DataError(f"item {number} is broken")
        loops.run(number)

    begun = time.monotonic()
    with Team(2) as team:
        loops = Loops(team)
        with pytest.raises(DataError, match=f"item {failing} is broken"):
            team.map(work, range(4))
    assert time.monotonic() - begun < LONG / 2
    # the one that ran was stopped, those that waited have not begun
    assert loops.stopped == [1 - failing]


def test_an_error_is_told_while_other_items_are_waited_for() -> None:
    """A transferred network that diverges ends the job while random ones are being trained."""

    def fail(_: int) -> None:
        assert loops.started.acquire(timeout=LONG)
        raise DataError("the transferred one is broken")

    with Team(2) as team:
        loops = Loops(team)
        team.start(fail, [0])
        with pytest.raises(DataError, match="the transferred one"):
            team.map(loops.run, [1])
    assert loops.stopped == [1]


def test_an_error_of_the_main_thread_stops_the_team() -> None:
    stopped: list[int] = []

    def job() -> None:
        with Team(2) as team:
            loops = Loops(team)
            loops.stopped = stopped
            team.start(loops.run, range(5))
            assert loops.started.acquire(timeout=LONG)
            raise ValueError("elsewhere")

    with pytest.raises(ValueError, match="elsewhere"):
        job()
    assert stopped
    assert set(stopped) <= {0, 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers(number: signal.Signals) -> None:
    def signal_when_running() -> None:
        for _ in range(2):
            assert loops.started.acquire(timeout=LONG)
        time.sleep(0.2)  # until the main thread waits
        os.kill(os.getpid(), number)

    begun = time.monotonic()
    with interruptible(), Team(2) as team:
        loops = Loops(team)
        threading.Thread(target=signal_when_running).start()
        with pytest.raises(KeyboardInterrupt):
            team.map(loops.run, range(4))
    assert time.monotonic() - begun < LONG / 2
    assert sorted(loops.stopped) == [0, 1]


def test_a_signal_just_before_the_main_thread_waits() -> None:
    """Python cannot interrupt a wait that a signal precedes by a hair."""

    def handle(*_: object) -> None:
        raise KeyboardInterrupt

    class Late(threading.Thread):
        """Comes while the main thread is in C code, as a signal before a system call does."""

        def run(self) -> None:
            assert loops.started.acquire(timeout=LONG)
            signal.pthread_kill(self.ident or 0, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, handle)
    begun = time.monotonic()
    try:
        with Team(1) as team:
            team.map(str, [0])  # the pool's thread is there, and nothing else is started
            loops = Loops(team)
            Late().start()
            with pytest.raises(KeyboardInterrupt):
                team.map(loops.run, [0])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert time.monotonic() - begun < LONG / 2
    assert loops.stopped == [0]


def test_a_team_that_was_not_stopped_disturbs_nobody() -> None:
    with Team(2) as team:
        team.observer.on_batch(EVENT)
        assert team.map(str, [1]) == ["1"]
        team.observer.on_batch(EVENT)

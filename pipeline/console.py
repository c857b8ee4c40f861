"""What a person sees while a job runs and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from nas.observer import BatchEvent, EpochRecord, Observer
from nas.statistics import Interval

CONSOLE = Console(highlight=False)  # one for all, so that lines go above a running bar

_QUIET_SECONDS = 30  # without a terminal, a long epoch shows a line this often


def say(message: str, console: Console = CONSOLE) -> None:
    """One status line, never cut or wrapped by us."""
    console.print(message, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """One line on stderr, in red on a terminal."""
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def human_count(value: float) -> str:
    """Three significant digits and a unit: 3349342 is "3.35 M"; ``value`` is at least 0."""
    units = ["", " k", " M", " G", " T"]
    # 999.5 would be written 1000, which belongs to the next unit
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    decimals = 0 if units[0] == "" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{units[0]}"


def human_seconds(seconds: float) -> str:
    """The two largest units: 75 is "1 min 15 s"; tenths below ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Observers(Observer):
    """Forwards each event to several observers, in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_batch(self, event: BatchEvent) -> None:
        for observer in self._observers:
            observer.on_batch(event)

    def on_resume(self, records: Sequence[EpochRecord]) -> None:
        for observer in self._observers:
            observer.on_resume(records)

    def on_epoch(self, record: EpochRecord) -> None:
        for observer in self._observers:
            observer.on_epoch(record)

    def on_warning(self, tag: str, message: str) -> None:
        for observer in self._observers:
            observer.on_warning(tag, message)


class _Loop:
    """Rate and time left of one loop, measured from the first event that was seen.

    A resumed loop enters with epochs done; they count as done, but not as speed.
    """

    def __init__(self, event: BatchEvent, now: float) -> None:
        self._started, self._done_before, self._images = now, _batches_done(event), 0
        self.event, self._now = event, now

    def update(self, event: BatchEvent, now: float) -> None:
        self._images += event.images
        self.event, self._now = event, now

    @property
    def rate(self) -> float | None:
        """Images a second; None until it can be known."""
        elapsed = self._now - self._started
        return self._images / elapsed if elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Of all epochs together; None until it can be known."""
        done = _batches_done(self.event)
        if done <= self._done_before:
            return None
        seconds_per_batch = (self._now - self._started) / (done - self._done_before)
        return seconds_per_batch * (self.event.epochs * self.event.batches - done)

    def figures(self) -> list[str]:
        """Loss, accuracy, rate and time left in words; without those not known yet."""
        rate, left = self.rate, self.seconds_left
        figures = [f"loss {self.event.loss:.3f}", f"accuracy {self.event.accuracy:.1%}"]
        if rate is not None:
            figures.append(f"{rate:.0f} images/s")
        if left:
            figures.append(f"{human_seconds(left)} left")
        return figures


class ProgressObserver(Observer):
    """A progress bar on a terminal, a plain line per epoch elsewhere.

    Both tell rate, loss, accuracy, and the time left for all epochs of the loop together. Use it
    as a context manager, so that the bar is gone from the terminal when an error is shown.

    Args:
        description: what is under way, e.g. "search on mnist5k"; stands before the bar, and at
            the start of each line.
        console: where to; its kind decides between bar and lines.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        description: str,
        console: Console = CONSOLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._console, self._clock = description, console, clock
        self._loops: dict[str, _Loop] = {}  # by phase
        self._current: _Loop | None = None  # the loop whose epochs are told
        self._last_line = clock()
        self._warned: set[str] = set()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressObserver:
        if self._console.is_interactive:
            self._bar = _bars(self._console).join()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            _bars(self._console).leave(self._tasks.values())

    def on_batch(self, event: BatchEvent) -> None:
        now = self._clock()
        loop = self._loops.get(event.phase)
        if loop is None:
            loop = self._loops[event.phase] = _Loop(event, now)
        else:
            loop.update(event, now)
        self._current = loop
        if self._bar:
            self._move_bar(self._bar, loop)
        elif now - self._last_line >= _QUIET_SECONDS:
            self._print_line(loop, f"batch {event.batch}/{event.batches}")

    def on_epoch(self, record: EpochRecord) -> None:
        if self._bar is None and self._current is not None:
            validation = record.metrics.get("val/accuracy")
            more = [] if validation is None else [f"validation {validation:.1%}"]
            self._print_line(self._current, *more)

    def on_warning(self, tag: str, message: str) -> None:
        if tag not in self._warned:
            self._warned.add(tag)
            text = f"warning: {message}"
            self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _move_bar(self, bar: Progress, loop: _Loop) -> None:
        event = loop.event
        if event.phase not in self._tasks:
            self._tasks[event.phase] = bar.add_task(self._description)
        bar.update(
            self._tasks[event.phase],
            total=event.epochs * event.batches,
            completed=_batches_done(event),
            status=" ".join([_epoch(event), *loop.figures()]),
        )

    def _print_line(self, loop: _Loop, *more: str) -> None:
        figures = ", ".join([_epoch(loop.event), *more, *loop.figures()])
        say(f"{time.strftime('%H:%M:%S')} {self._description}: {figures}", self._console)
        self._last_line = self._clock()


@dataclass(frozen=True)
class Summary:
    """What a job came to. Accuracies are of the target's test split, 0..1.

    Attributes:
        architecture: what was trained: how it was found, or what it is called.
        accuracy: of that network over seeds.
        random_accuracy: of as many random networks under the same recipe.
        improvement: of the first over the second, in percent.
        linear_accuracy: of a linear model on the target.
        macs: multiply-adds of convolutions and fully connected layers for one image.
        ui_command: opens the MLflow UI on this store.
        source: the data set of the search, None where nothing was searched.
        linear_source_accuracy: of a linear model on the source's validation split.
        search_seconds: what the search on the source cost, also where it was reused.
    """

    target: str
    architecture: str
    accuracy: Interval
    random_accuracy: Interval
    improvement: Interval
    linear_accuracy: float
    parameters: int
    macs: int
    model_name: str
    model_version: str
    model_alias: str
    ui_command: str
    source: str | None = None
    linear_source_accuracy: float | None = None
    search_seconds: float | None = None


def print_summary(summary: Summary, console: Console = CONSOLE) -> None:
    """The small table that ends a job; long values fold, nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _summary_rows(summary):
        table.add_row(label, value)
    console.print(table, markup=False)
    say(f"open the MLflow UI: {summary.ui_command}", console)


def summary_markdown(summary: Summary) -> str:
    """The same table for the MLflow UI, which shows Markdown."""
    rows = [(label, value.replace("|", r"\|")) for label, value in _summary_rows(summary)]
    lines = (f"| {label} | {value} |" for label, value in rows)
    return "\n".join(["| | |", "|---|---|", *lines])


def _summary_rows(summary: Summary) -> list[tuple[str, str]]:
    gain = summary.improvement
    rows = [
        ("target", f"{summary.target} (linear model {summary.linear_accuracy:.2%})"),
        ("architecture", summary.architecture),
        ("test accuracy", _accuracy(summary.accuracy)),
        ("random baseline", _accuracy(summary.random_accuracy)),
        ("relative improvement", f"{gain.mean:+.2f}% {_bounds(gain.low, gain.high, '+.2f')}"),
        ("parameters", human_count(summary.parameters)),
        ("multiply-adds", human_count(summary.macs)),
        (
            "registered model",
            f"{summary.model_name} version {summary.model_version} ({summary.model_alias})",
        ),
    ]
    if summary.search_seconds is not None:
        rows.insert(-1, ("search time", human_seconds(summary.search_seconds)))
    if summary.source is not None:
        linear = summary.linear_source_accuracy
        beside = "" if linear is None else f" (linear model {linear:.2%}, validation)"
        rows.insert(0, ("source", f"{summary.source}{beside}"))
    return rows


def _accuracy(interval: Interval) -> str:
    bounds = _bounds(100 * interval.low, 100 * interval.high, ".2f")
    return f"{interval.mean:.2%} {bounds}, n = {interval.n}"


def _bounds(low: float, high: float, form: str) -> str:
    if math.isnan(low):
        return "(one training: no interval)"
    return f"(95% interval {low:{form}} to {high:{form}}%)"


@contextmanager
def counting(
    description: str,
    console: Console = CONSOLE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of work that is counted, such as files read: call it with (what, done, total).

    A bar with the time left on a terminal; elsewhere a line when the work lasts.
    """
    bar = _bars(console).join() if console.is_interactive else None
    tasks: dict[str, TaskID] = {}
    started: dict[str, float] = {}
    last_line = clock()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last_line
        now = clock()
        left = (now - started.setdefault(what, now)) * (total - done) / max(done, 1)
        status = f"{what} {done:,}/{total:,}" + (f" {human_seconds(left)} left" if left else "")
        if bar:
            if what not in tasks:
                tasks[what] = bar.add_task(description)
            bar.update(tasks[what], total=total, completed=done, status=status)
        elif now - last_line >= _QUIET_SECONDS:
            say(f"{time.strftime('%H:%M:%S')} {description}: {status}", console)
            last_line = now

    try:
        yield show
    finally:
        if bar:
            _bars(console).leave(tasks.values())


def _batches_done(event: BatchEvent) -> int:
    return event.epoch * event.batches + event.batch


def _epoch(event: BatchEvent) -> str:
    return f"epoch {event.epoch + 1}/{event.epochs}"


class _BarAndStatus(ProgressColumn):
    """What is under way with its bar, and the figures below: side by side they pass 80 columns."""

    def render(self, task: Task) -> Group:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_row(
            Text(task.description), ProgressBar(total=task.total, completed=task.completed)
        )
        return Group(head, Text(f"  {task.fields.get('status', '')}", no_wrap=True))


class _Bars:
    """The live display of a console: one for all loops that run side by side."""

    def __init__(self, console: Console) -> None:
        self._console, self._users, self._lock = console, 0, Lock()
        self._progress: Progress | None = None

    def join(self) -> Progress:
        """The display, which starts with its first user."""
        with self._lock:
            if self._progress is None:
                column = _BarAndStatus(Column(ratio=1))
                self._progress = Progress(column, console=self._console, expand=True)
                self._progress.start()
            self._users += 1
            return self._progress

    def leave(self, tasks: Iterable[TaskID]) -> None:
        """Remove a user's bars; the display goes with its last user."""
        with self._lock:
            if self._progress is None:
                return
            for task in tasks:
                self._progress.remove_task(task)
            self._users -= 1
            if self._users == 0:
                self._progress.stop()
                self._progress = None


@cache
def _bars(console: Console) -> _Bars:
    return _Bars(console)

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

from nas.observer import VALIDATION, BatchEvent, EpochRecord, Observer
from nas.statistics import Interval
from nas.transfer.nearest import Standing

CONSOLE = Console(highlight=False)  # one for all, so that lines go above a running bar

# How an epoch did: of a network that is trained, or of a search's supernet.
VALIDATION_ACCURACIES = ("val/accuracy", "supernet/val_accuracy")
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


class _Phase:
    """Rate and time left of one phase of a loop, measured from the first event that was seen.

    A resumed loop enters with epochs done; they count as done, but not as speed.
    """

    def __init__(self, event: BatchEvent) -> None:
        self.event = event
        self._seen_from, self._images, self._seconds = self.done, 0, 0.0

    def update(self, event: BatchEvent, seconds: float) -> None:
        """``seconds`` since the event before, whichever phase that was of."""
        self.event = event
        self._images += event.images
        self._seconds += seconds

    @property
    def done(self) -> int:
        """Batches of all epochs."""
        return self.event.epoch * self.event.batches + self.event.batch

    @property
    def total(self) -> int:
        """Batches of all epochs, those to come among them."""
        return self.event.epochs * self.event.batches

    @property
    def seconds_left(self) -> float:
        """In all epochs together; 0 until it can be known."""
        return self._seconds / max(1, self.done - self._seen_from) * (self.total - self.done)

    def figures(self) -> list[str]:
        """Loss, accuracy and rate in words; without a rate not known yet."""
        what = "val loss" if self.event.phase == VALIDATION else "loss"
        figures = [f"{what} {self.event.loss:.3f}", f"accuracy {self.event.accuracy:.1%}"]
        if self._seconds > 0:
            figures.append(f"{self._images / self._seconds:.0f} images/s")
        return figures


class ProgressObserver(Observer):
    """A progress bar on a terminal, a plain line per epoch elsewhere.

    Both tell rate, loss, accuracy, and the time left for all epochs of the loop together, with
    their validation. Use it as a context manager, so that the bar is gone from the terminal when
    an error is shown.

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
        self._phases: dict[str, _Phase] = {}
        self._learning: _Phase | None = None  # the one whose epochs are told
        self._last_line = self._last_event = clock()
        self._warned: set[str] = set()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

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
            _bars(self._console).leave([] if self._task is None else [self._task])

    def on_batch(self, event: BatchEvent) -> None:
        now = self._clock()
        phase = self._phases.get(event.phase)
        if phase is None:
            phase = self._phases[event.phase] = _Phase(event)
        else:
            phase.update(event, now - self._last_event)
        self._last_event = now
        if event.phase != VALIDATION:
            self._learning = phase
        if self._bar:
            self._move_bar(self._bar, phase)
        elif now - self._last_line >= _QUIET_SECONDS:
            what = "validation batch" if event.phase == VALIDATION else "batch"
            self._print_line(phase, f"{what} {event.batch}/{event.batches}")

    def on_epoch(self, record: EpochRecord) -> None:
        if self._bar is None and self._learning is not None:
            accuracies = (record.metrics.get(name) for name in VALIDATION_ACCURACIES)
            more = [f"validation {value:.1%}" for value in accuracies if value is not None]
            self._print_line(self._learning, *more)

    def on_warning(self, tag: str, message: str) -> None:
        if tag not in self._warned:
            self._warned.add(tag)
            text = f"warning: {message}"
            self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _move_bar(self, bar: Progress, phase: _Phase) -> None:
        if self._task is None:
            self._task = bar.add_task(self._description)
        bar.update(
            self._task,
            total=sum(phase.total for phase in self._phases.values()),
            completed=sum(phase.done for phase in self._phases.values()),
            status=" ".join([_epoch(phase), *phase.figures(), *self._time_left()]),
        )

    def _print_line(self, phase: _Phase, *more: str) -> None:
        figures = ", ".join([_epoch(phase), *more, *phase.figures(), *self._time_left()])
        say(f"{time.strftime('%H:%M:%S')} {self._description}: {figures}", self._console)
        self._last_line = self._clock()

    def _time_left(self) -> list[str]:
        left = sum(phase.seconds_left for phase in self._phases.values())
        return [f"{human_seconds(left)} left"] if left else []


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


def print_ranking(ranked: Sequence[Standing], console: Console = CONSOLE) -> None:
    """Supernets of the registry for a target, the nearest first, and why some may not be taken."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("supernet", "searched on", "distance", "overlap", ""):
        right = column in ("distance", "overlap")
        table.add_column(column, overflow="fold", justify="right" if right else "left")
    for place, standing in enumerate(ranked):
        is_known = math.isfinite(standing.distance)
        table.add_row(
            Text(standing.name),
            Text(", ".join(standing.sources)),
            f"{standing.distance:.3f}" if is_known else "unknown",
            f"{standing.overlap:.1%}",
            Text(standing.refused or ("taken" if place == 0 else "")),
        )
    console.print(table)


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


def _epoch(phase: _Phase) -> str:
    return f"epoch {phase.event.epoch + 1}/{phase.event.epochs}"


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

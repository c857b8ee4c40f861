"""What the console shows, on a terminal and where it is piped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
from rich.console import Console

from nas.observer import VALIDATION, BatchEvent, EpochRecord, Observer
from nas.statistics import Interval
from pipeline.console import (
    Observers,
    ProgressObserver,
    Summary,
    _bars,
    counting,
    human_count,
    human_seconds,
    print_summary,
    say,
    summary_markdown,
)

SUMMARY = Summary(
    source="mnist5k",
    target="animals",
    architecture="darts, cell transfer",
    accuracy=Interval(0.8321, 0.8102, 0.8540, 3),
    random_accuracy=Interval(0.8021, 0.7702, 0.8340, 3),
    improvement=Interval(3.74, -0.21, 7.12, 3),
    linear_accuracy=0.551,
    linear_source_accuracy=0.912,
    parameters=3_349_342,
    macs=528_400_000,
    search_seconds=75.0,
    model_name="nas-transfer-animals",
    model_version="7",
    model_alias="champion",
    ui_command="/a/long/way/to/an/environment/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db",
)


class Clock:
    """Seconds that pass only when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_console(terminal: bool, width: int = 80) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        force_interactive=terminal,
        width=width,
        color_system=None,
        legacy_windows=False,
        highlight=False,
    )


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def batches(
    first_epoch: int, epochs: int, per_epoch: int, phase: str = "train"
) -> Iterator[BatchEvent]:
    for epoch in range(first_epoch, epochs):
        for batch in range(1, per_epoch + 1):
            yield BatchEvent(phase, epoch, epochs, batch, per_epoch, 64, 1.25, 0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (3_349_342, "3.35 M"),
        (528_400_000, "528 M"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (9_999_000, "10.0 M"),
        (99_990_000, "100 M"),
        (1_500_000_000, "1.50 G"),
        (5e15, "5000 T"),
    ],
)
def test_human_count(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.8, "1 h 0 min"),
        (90_061, "25 h 1 min"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_say_neither_wraps_nor_reads_markup() -> None:
    console = make_console(terminal=False)
    message = "[red]" + "x" * 200
    say(message, console)
    assert text_of(console) == message + "\n"


def test_a_piped_loop_prints_one_line_an_epoch(clock: Clock) -> None:
    console = make_console(terminal=False)
    with ProgressObserver("search on mnist5k", console, clock) as observer:
        for event in batches(0, epochs=2, per_epoch=4):
            clock.now += 0.5
            observer.on_batch(event)
            if event.batch == 4:
                observer.on_epoch(EpochRecord(event.epoch, {"val/accuracy": 0.625}))
    first, second = text_of(console).splitlines()
    # after 4 of 8 batches, half a second each: 3 batches of 64 images in 1.5 s, 2 s to go
    assert first[8:] == (
        " search on mnist5k: epoch 1/2, validation 62.5%, loss 1.250, accuracy 50.0%, "
        "128 images/s, 2.0 s left"
    )
    assert "epoch 2/2" in second
    assert "left" not in second


def test_a_long_epoch_prints_at_most_a_line_each_30_seconds(clock: Clock) -> None:
    console = make_console(terminal=False)
    observer = ProgressObserver("training", console, clock)
    for event in batches(0, epochs=1, per_epoch=100):
        clock.now += 1
        observer.on_batch(event)
    lines = text_of(console).splitlines()
    assert [line.split("batch ")[1].split(",")[0] for line in lines] == [
        "30/100",
        "60/100",
        "90/100",
    ]


def test_a_resumed_loop_counts_only_its_own_batches_as_speed(clock: Clock) -> None:
    console = make_console(terminal=False)
    observer = ProgressObserver("training", console, clock)
    for event in batches(first_epoch=8, epochs=10, per_epoch=10):
        if event.epoch == 9:
            break
        observer.on_batch(event)
        clock.now += 1
    observer.on_epoch(EpochRecord(8, {}))
    assert "64 images/s, 10 s left" in text_of(console)


def epochs_with_validation(clock: Clock, observer: ProgressObserver, epochs: int) -> None:
    """Three batches of a second each, then three of validation of ten seconds each."""
    for epoch in range(epochs):
        for event in list(batches(epoch, epochs, per_epoch=3))[:3]:
            clock.now += 1
            observer.on_batch(event)
        for event in list(batches(epoch, epochs, per_epoch=3, phase=VALIDATION))[:3]:
            clock.now += 10
            observer.on_batch(replace(event, loss=0.75, accuracy=0.625))
        observer.on_epoch(EpochRecord(epoch, {"supernet/val_accuracy": 0.625}))


def test_a_long_validation_shows_lines_of_its_own(clock: Clock) -> None:
    console = make_console(terminal=False)
    observer = ProgressObserver("training", console, clock)
    epochs_with_validation(clock, observer, epochs=2)
    lines = [line.partition("training: ")[2] for line in text_of(console).splitlines()]
    # 6.4 images/s: 64 in each ten seconds. Left: three batches of a second, three of ten.
    assert lines == [
        "epoch 1/2, validation batch 3/3, val loss 0.750, accuracy 62.5%, 6 images/s, 33 s left",
        "epoch 1/2, validation 62.5%, loss 1.250, accuracy 50.0%, 64 images/s, 33 s left",
        "epoch 2/2, validation batch 3/3, val loss 0.750, accuracy 62.5%, 6 images/s",
        "epoch 2/2, validation 62.5%, loss 1.250, accuracy 50.0%, 64 images/s",
    ]


def test_a_bar_moves_during_validation(clock: Clock) -> None:
    console = make_console(terminal=True)
    with ProgressObserver("training", console, clock) as observer:
        epochs_with_validation(clock, observer, epochs=2)
        assert observer._bar is not None
        (task,) = observer._bar.tasks
        assert (task.completed, task.total) == (12, 12)
        for phase, loss in (("train", "loss 1.250"), (VALIDATION, "val loss 1.250")):
            observer.on_batch(next(batches(1, 2, per_epoch=3, phase=phase)))
            assert task.fields["status"].startswith(f"epoch 2/2 {loss} accuracy 50.0%")
            assert task.completed < 12


def test_counted_work_shows_a_line_where_it_lasts(clock: Clock) -> None:
    console = make_console(terminal=False)
    with counting("reading pets", console, clock) as progress:
        for done in range(0, 101, 10):
            progress("checking images", done, 100)
            clock.now += 10
    lines = text_of(console).splitlines()
    assert [line.split("images ")[1] for line in lines] == [
        "30/100 1 min 10 s left",
        "60/100 40 s left",
        "90/100 10 s left",
    ]


def test_counted_work_has_a_bar_on_a_terminal(clock: Clock) -> None:
    console = make_console(terminal=True)
    with counting("reading pets", console, clock) as progress:
        progress("checking images", 0, 4)
        clock.now += 1
        progress("checking images", 2, 4)
        display = _bars(console).join()
        display.refresh()
        _bars(console).leave(())
    shown = text_of(console)
    assert "reading pets" in shown
    assert "checking images 2/4" in shown
    assert "1.0 s left" in shown


def test_a_terminal_shows_a_bar_over_all_epochs(clock: Clock) -> None:
    console = make_console(terminal=True)
    with ProgressObserver("search on mnist5k", console, clock) as observer:
        for event in batches(0, epochs=4, per_epoch=10):
            clock.now += 0.1
            observer.on_batch(event)
            if event.epoch == 2:
                break
        assert observer._bar is not None
        assert observer._bar.tasks[0].percentage == pytest.approx(100 * 21 / 40)
        observer._bar.refresh()
    output = text_of(console)
    assert re.search(r"search on mnist5k ━{20,}", output)
    assert "epoch 3/4 loss 1.250 accuracy 50.0% 640 images/s 1.9 s left" in output
    assert output.endswith("\x1b[?25h")  # the cursor is shown again
    assert "…" not in output


@pytest.mark.parametrize(("phase", "loss"), [("training", "loss"), (VALIDATION, "val loss")])
def test_the_widest_status_fits_80_columns(clock: Clock, phase: str, loss: str) -> None:
    console = make_console(terminal=True)
    with ProgressObserver("train transferred, seed 0 on animals", console, clock) as observer:
        for event in list(batches(99, epochs=600, per_epoch=400, phase=phase))[:30]:
            clock.now += 0.4
            observer.on_batch(replace(event, images=4938, accuracy=0.999))
        assert observer._bar is not None
        observer._bar.refresh()
    output = text_of(console)
    assert f"epoch 100/600 {loss} 1.250 accuracy 99.9% 12345 images/s 22 h 15 min left" in output


def test_loops_side_by_side_share_one_display(clock: Clock) -> None:
    console = make_console(terminal=True)
    first = ProgressObserver("train transferred, seed 0", console, clock)
    second = ProgressObserver("train random 0", console, clock)
    event = next(batches(0, epochs=4, per_epoch=10))
    with first:
        with second:
            assert first._bar is second._bar
            bars = first._bar
            assert bars is not None
            first.on_batch(event)
            second.on_batch(replace(event, batch=7))
            bars.refresh()
            assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
                ("train transferred, seed 0", 1, 40),
                ("train random 0", 7, 40),
            ]
        # whoever ends takes its own bars away and leaves the display to the others
        assert [task.description for task in bars.tasks] == ["train transferred, seed 0"]
        assert bars.live.is_started
    assert not bars.live.is_started
    with ProgressObserver("the next one", console, clock) as third:
        assert third._bar is not bars
    assert "train random 0 ━" in text_of(console)


def test_threads_leave_a_shared_display_in_any_order() -> None:
    console = make_console(terminal=True)
    barrier = Barrier(4)

    def loop(number: int) -> None:
        with ProgressObserver(f"loop {number}", console) as observer:
            barrier.wait()
            for event in batches(0, epochs=2, per_epoch=20):
                observer.on_batch(event)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(loop, range(4)))
    output = text_of(console)
    assert all(f"loop {number}" in output for number in range(4))
    # hidden once and shown once: there was never a second display
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_is_shown_once(terminal: bool) -> None:
    console = make_console(terminal)
    with ProgressObserver("search", console) as observer:
        observer.on_warning("collapse", "3 skips [of 8]")
        observer.on_warning("collapse", "4 skips [of 8]")
        observer.on_warning("other", "something else")
    output = text_of(console)
    assert output.count("warning: 3 skips [of 8]") == 1
    assert "4 skips" not in output
    assert "warning: something else" in output


def test_an_error_inside_leaves_the_terminal_whole() -> None:
    console = make_console(terminal=True)
    with pytest.raises(ValueError, match="boom"), ProgressObserver("search", console):
        raise ValueError("boom")
    assert text_of(console).endswith("\x1b[?25h")


def test_observers_forward_everything_in_order() -> None:
    seen: list[object] = []

    class Recorder(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_batch(self, event: BatchEvent) -> None:
            seen.append((self.name, event))

        def on_epoch(self, record: EpochRecord) -> None:
            seen.append((self.name, record))

        def on_warning(self, tag: str, message: str) -> None:
            seen.append((self.name, tag, message))

    both = Observers(Recorder("a"), Recorder("b"))
    event, record = next(batches(0, 1, 1)), EpochRecord(0, {})
    both.on_batch(event)
    both.on_epoch(record)
    both.on_warning("tag", "message")
    assert seen == [
        ("a", event),
        ("b", event),
        ("a", record),
        ("b", record),
        ("a", "tag", "message"),
        ("b", "tag", "message"),
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_summary_is_whole_at_80_columns(terminal: bool) -> None:
    console = make_console(terminal)
    print_summary(SUMMARY, console)
    output = text_of(console)
    assert "…" not in output
    for part in (
        "mnist5k (linear model 91.20%, validation)",
        "animals (linear model 55.10%)",
        "83.21% (95% interval 81.02 to 85.40%), n = 3",
        "80.21% (95% interval 77.02 to 83.40%), n = 3",
        "+3.74% (95% interval -0.21 to +7.12%)",
        "3.35 M",
        "528 M",
        "1 min 15 s",
        "nas-transfer-animals version 7 (champion)",
        SUMMARY.ui_command + "\n",  # on one line, so that it can be copied
    ):
        assert part in output
    table = output.split("open the MLflow UI")[0]
    assert all(len(line) <= 80 for line in table.splitlines())


def test_the_same_table_in_markdown() -> None:
    lines = summary_markdown(replace(SUMMARY, target="folder:a|b")).splitlines()
    assert lines[:2] == ["| | |", "|---|---|"]
    assert r"| target | folder:a\|b (linear model 55.10%) |" in lines
    assert "| test accuracy | 83.21% (95% interval 81.02 to 85.40%), n = 3 |" in lines
    assert "| registered model | nas-transfer-animals version 7 (champion) |" in lines


def test_a_long_name_folds() -> None:
    console = make_console(terminal=False)
    path = "folder:/" + "/".join(f"directory{number}" for number in range(12)) + "/[pets]"
    print_summary(replace(SUMMARY, target=path), console)
    output = text_of(console)
    assert "…" not in output
    assert path in "".join(output.split())


def test_one_training_claims_no_interval() -> None:
    console = make_console(terminal=False)
    single = Interval(0.8, math.nan, math.nan, 1)
    print_summary(replace(SUMMARY, accuracy=single, improvement=single), console)
    assert "80.00% (one training: no interval), n = 1" in text_of(console)
    assert "nan" not in text_of(console)


def test_summary_is_plain_ascii_when_the_output_is() -> None:
    """A log file with an ASCII encoding must not end a finished transfer with an error."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_summary(SUMMARY, console)
    console.file.flush()
    assert b"relative improvement" in raw.getvalue()

"""What was measured, as JSON, as tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from rich import box
from rich.table import Table

from benchmarks.supernet.floors import Floor, Rates
from benchmarks.supernet.memory import Memory
from benchmarks.supernet.setting import STEP, Setting
from benchmarks.supernet.timing import Spread
from nas.ops.backend import BFLOAT16
from pipeline.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, new_figure, quiet

COLOURS = {"authors": GREY, "eager": ORANGE, "compile": GREEN, "native": BLUE}
RIVALS = ("authors", "compile", "eager")
_THICKNESS = 0.7  # of a bar


@dataclass(frozen=True)
class Row:
    """One implementation in one phase of one setting.

    Attributes:
        dtype: what images are stored in.
        times: milliseconds over the turns.
        memory: of a process that did nothing else.
        load: average over the last minute, when the row was finished.
    """

    setting: Setting
    implementation: str
    dtype: str
    phase: str
    threads: int
    times: Spread
    memory: Memory
    load: float

    @property
    def name(self) -> str:
        """For people: the implementation, with its type where that is not float32."""
        return self.implementation + (" bf16" if self.dtype == BFLOAT16 else "")

    def to_json(self) -> dict[str, Any]:
        """One flat row.

        ``peak_mb`` is the highest resident set in the phase in 2^20 bytes, of which the imports
        are ``idle_mb``; ``first_seconds`` are those of the first turn through all phases, with
        whatever it compiles.
        """
        return {
            **self.setting.columns,
            "implementation": self.implementation,
            "phase": self.phase,
            "dtype": self.dtype,
            "threads": self.threads,
            "median_ms": self.times.median,
            "min_ms": self.times.min,
            "max_ms": self.times.max,
            "repetitions": self.times.count,
            "trusted": self.times.trusted,
            "peak_mb": self.memory.peak_mb[self.phase],
            "idle_mb": self.memory.idle_mb,
            "first_seconds": self.memory.first_seconds,
            "load": self.load,
        }


Item = TypeVar("Item", Row, Floor)


def write_json(
    path: Path,
    machine: dict[str, Any],
    rows: Sequence[Row],
    rates: Sequence[Rates] = (),
    floors: Sequence[Floor] = (),
) -> None:
    """Everything that was measured so far; a reader never sees half a file."""
    report: dict[str, Any] = {"machine": machine, "rows": [row.to_json() for row in rows]}
    if floors:
        report["rates"] = [asdict(rate) for rate in rates]
        report["floors"] = [floor.to_json() for floor in floors]
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(path)


def row_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Times, memory, and how many times faster than each rival: a table a setting and threads."""
    for (setting, threads), group in _grouped(rows):
        untrusted = not all(row.times.trusted for row in group)
        table = _table(setting, threads)
        table.caption = "?: the second core was not there throughout" if untrusted else None
        table.add_column("phase", no_wrap=True)
        table.add_column("by", no_wrap=True)
        figures = ("median ms", "min to max", "n", "peak MB", "- imports")
        for name in (*figures, *(f"× {rival}" for rival in RIVALS)):
            table.add_column(name, justify="right", no_wrap=True)
        for before, row in zip([None, *group], group, strict=False):
            if before and before.phase != row.phase:
                table.add_section()
            table.add_row(
                row.phase,
                row.name,
                f"{row.times.median:,.1f}{'' if row.times.trusted else ' ?'}",
                f"{row.times.min:,.1f} to {row.times.max:,.1f}",
                str(row.times.count),
                f"{row.memory.peak_mb[row.phase]:,.0f}",
                f"{row.memory.peak_mb[row.phase] - row.memory.idle_mb:,.0f}",
                *(_factor(speed_up(row, rival, rows)) for rival in RIVALS),
            )
        yield table


def speed_up(row: Row, rival: str, rows: Iterable[Row]) -> float | None:
    """How many times faster ``row`` is than ``rival`` in the same place, by medians."""
    for other in rows:
        place = (other.setting, other.threads, other.phase, other.implementation)
        if place == (row.setting, row.threads, row.phase, rival) and other is not row:
            return other.times.median / row.times.median
    return None


def floor_tables(
    floors: Sequence[Floor], rates: Sequence[Rates], rows: Sequence[Row]
) -> Iterator[Table]:
    """The least time of each phase, and how many times that each implementation takes."""
    names = list(dict.fromkeys(row.name for row in rows))
    measured = {rate.threads: rate for rate in rates}
    for (setting, threads), group in _grouped(floors):
        rate = measured[threads]
        table = _table(setting, threads)
        table.caption = (
            f"{'' if rate.trusted else '? '}matrix product {rate.gflops:.0f} GFLOP/s, "
            f"copy {rate.copy_gb_s:.1f} GB/s; "
            "on the right, times over the higher floor"
        )
        table.add_column("phase", no_wrap=True)
        for name in ("GFLOP", "arithmetic ms", "GB", "memory ms", *names):
            table.add_column(name, justify="right", no_wrap=True)
        for floor in group:
            reached = {
                row.name: row.times.median / floor.milliseconds
                for row in rows
                if (row.setting, row.threads, row.phase) == (setting, threads, floor.phase)
            }
            table.add_row(
                floor.phase,
                f"{floor.gflop:.2f}",
                f"{floor.arithmetic_ms:.1f}",
                f"{floor.gigabytes:.3f}",
                f"{floor.memory_ms:.1f}",
                *(_factor(reached.get(name)) for name in names),
            )
        yield table


def draw(rows: Sequence[Row], path: Path) -> None:
    """The whole search step of every setting: time on the left, peak memory on the right."""
    steps = [row for row in rows if row.phase == STEP]
    settings = list(dict.fromkeys(row.setting for row in steps))
    bars = [[row for row in steps if row.setting == setting] for setting in settings]
    figure, axes = new_figure(
        sum(0.9 + 0.34 * len(group) for group in bars) + 0.3, rows=len(settings), columns=2
    )
    grid = axes[0].get_gridspec()
    assert grid is not None
    grid.set_height_ratios([2.6 + len(group) for group in bars])
    for index, group in enumerate(bars):
        times, memory = axes[2 * index : 2 * index + 2]
        _draw_times(times, group)
        _draw_memory(memory, group)
    figure.savefig(path)


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    present = {row.implementation for row in rows}
    rival = "authors" if "authors" in present else "eager"
    for height, row in enumerate(rows):
        factor = speed_up(row, rival, rows)
        parts = [f"{row.times.median:,.{0 if row.times.median >= 10 else 1}f} ms"]
        parts += [f"{factor:.1f}×"] if factor else []
        parts += [] if row.times.trusted else ["not trusted"]
        _bar(axes, height, row, row.times.median, row.times.max, "  ".join(parts))
        axes.plot([row.times.min, row.times.max], [height] * 2, color=BLACK, linewidth=1.2)
    against = f"; × faster than {rival}" if rival in present and len(present) > 1 else ""
    labels = [f"{row.name}, {row.threads} thr." for row in rows]
    _finish(axes, rows[0].setting.label, f"search step, ms: median and range{against}", labels)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    for height, row in enumerate(rows):
        peak = row.memory.peak_mb[row.phase]
        _bar(axes, height, row, peak, peak, f"{peak:,.0f} MB")
        axes.barh(height, row.memory.idle_mb, color=PALE, height=_THICKNESS)
    _finish(axes, "peak memory", "MB resident; pale: imports alone", [""] * len(rows))


def _bar(axes: Axes, height: int, row: Row, value: float, end: float, text: str) -> None:
    """A bar up to ``value``, its text beyond ``end``."""
    colour, alpha = COLOURS[row.implementation], 1.0 if row.times.trusted else 0.5
    axes.barh(height, value, color=colour, height=_THICKNESS, alpha=alpha)
    axes.annotate(text, (end, height), (5, 0), textcoords="offset points", va="center", fontsize=9)


def _finish(axes: Axes, title: str, unit: str, labels: Sequence[str]) -> None:
    quiet(axes, title, x=unit)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * axes.dataLim.x1)  # room for the text of the longest bar


def _grouped(items: Sequence[Item]) -> list[tuple[tuple[Setting, int], list[Item]]]:
    """``items`` by setting and threads, in the order they came."""
    groups: dict[tuple[Setting, int], list[Item]] = {}
    for item in items:
        groups.setdefault((item.setting, item.threads), []).append(item)
    return list(groups.items())


def _table(setting: Setting, threads: int) -> Table:
    title = f"{setting.label}, {threads} thread{'s' * (threads > 1)}"
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

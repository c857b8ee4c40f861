"""What a study of warm starts found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    count_epochs,
    new_figure,
    quiet,
)

_COLOURS = {
    "scratch": GREY,
    "nearest": BLUE,
    "random": ORANGE,
    "farthest": VERMILLION,
    "multi": GREEN,
}
_SMALLEST, _LARGEST = 180, 1300  # areas of a circle
_NEVER = "0: never reached"


def draw_speed_ups(groups: Mapping[str, Sequence[float]]) -> Figure:
    """A row of circles for each group: how many races had which speed-up, and their median."""
    figure, (axes,) = new_figure(1.9 + 0.8 * len(groups))
    quiet(
        axes,
        "how much shorter a search may be that ends no lower than one from scratch",
        x=f"speed-up in epochs ({_NEVER}); circles hold numbers of races, the bar is the median",
    )
    axes.grid(visible=False, axis="y")
    for row, (name, values) in enumerate(groups.items()):
        colour = _COLOURS.get(name, PURPLE)
        middle = float(np.median(values))
        axes.plot([middle] * 2, [row - 0.45, row + 0.45], color=colour, linewidth=3)
        for value, count in sorted(Counter(values).items()):
            area = _LARGEST * count / len(values)
            axes.scatter(value, row, s=area + _SMALLEST, color=colour, linewidth=0, zorder=3)
            axes.text(value, row, f"{count}", ha="center", va="center", color="white", zorder=4)
    axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    return figure


def draw_distance_effect(
    points: Mapping[str, Sequence[tuple[float, float]]], epochs: int
) -> Figure:
    """(distance, gain in points after ``epochs``) of the races of each group."""
    figure, (axes,) = new_figure(5.6)
    quiet(
        axes,
        f"{epochs} epochs with a warm start less the whole search from scratch",
        x="OTDD of pixels, target to source",
        y="validation accuracy, points",
    )
    for name, pairs in points.items():
        distances, gains = zip(*pairs, strict=True)
        colour = _COLOURS.get(name, PURPLE)
        axes.scatter(distances, gains, s=34, color=colour, alpha=0.7, linewidth=0, label=name)
    axes.axhline(0, color=BLACK, linewidth=1, linestyle="--")
    figure.legend(loc="outside upper right", ncols=5, frameon=False)
    return figure


def draw_mean_curves(curves: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Mean validation accuracy (0..1) of each group by epoch, or by budget where few are known.

    All groups must be of the same targets, methods and seeds, or their means differ by those.
    """
    figure, (axes,) = new_figure(5.6)
    searches = len(next(iter(next(iter(curves.values())).values())))
    quiet(
        axes,
        f"validation accuracy of {searches} supernets of each kind: scratch as it goes, the others "
        "at their end",
        y="mean top-1 (%)",
    )
    for name, group in curves.items():
        means = [100 * float(np.mean(values)) for values in group.values()]
        dots = "" if name == "scratch" else "o"
        colour = _COLOURS.get(name, PURPLE)
        axes.plot(list(group), means, color=colour, marker=dots, linewidth=2, label=name)
    count_epochs(axes)
    figure.legend(loc="outside upper right", ncols=5, frameon=False)
    return figure


def draw_pairs(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Test accuracies (0..1) of pairs: (scratch, warm) of each comparison, one panel each."""
    figure, panels = new_figure(4.4, columns=len(pairs))
    for axes, (title, values) in zip(panels, pairs.items(), strict=True):
        scratch, warm = 100 * np.asarray(values, dtype=np.float64).T
        quiet(axes, title, x="from scratch (%)", y="warm start (%)")
        low, high = min(scratch.min(), warm.min()) - 2, max(scratch.max(), warm.max()) + 2
        axes.plot([low, high], [low, high], color=BLACK, linewidth=1, linestyle="--")
        axes.scatter(scratch, warm, s=34, color=BLUE, alpha=0.7, linewidth=0, zorder=3)
        axes.set_aspect("equal")
    return figure

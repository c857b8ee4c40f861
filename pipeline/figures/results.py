"""What came out: confusions of one network, and networks beside one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from nas.statistics import mean_interval
from pipeline.figures.style import BLUE, GREY, ORANGE, VERMILLION, new_figure, quiet

_NUMBERED_CLASSES = 20  # more cells than this squared are too small for numbers
_GROUP_COLOURS = {"transferred": BLUE, "random": GREY}


@dataclass(frozen=True)
class NetworkAccuracies:
    """Test accuracies (0..1) of one network over seeds, or of several random networks."""

    label: str
    group: str  # "transferred", "random", or another that the caller compares with
    accuracies: tuple[float, ...]


def draw_confusion(matrix: ArrayLike, classes: Sequence[str]) -> Figure:
    """Where the images of each class went.

    Args:
        matrix: [classes, classes] counts, rows are the true classes. A class without images has
            an empty row.
        classes: names in the order of the matrix.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    figure, (axes,) = new_figure(8.6)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    correct, total = int(np.trace(counts)), int(counts.sum())
    share = f" ({correct / total:.1%})" if total else ""
    axes.set_title(
        f"{correct:,} of {total:,} images correct{share}",
        loc="left",
        fontsize=12,
        fontweight="bold",
    )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _NUMBERED_CLASSES:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, classes)
        _number_cells(axes, shares)
    figure.colorbar(image, shrink=0.8, label="share of the true class", format=PercentFormatter(1))
    return figure


def draw_comparison(
    rows: Sequence[NetworkAccuracies], linear_accuracy: float | None = None
) -> Figure:
    """Test accuracy of each row: a dot a seed, and the mean with its 95% interval.

    Rows stand in the order given, from the top. ``linear_accuracy`` (0..1) is a line that shows
    how much of the task a linear model solves.
    """
    figure, (axes,) = new_figure(1.7 + 0.42 * len(rows))
    quiet(axes, "test accuracy", x="top-1 (%): dots are single trainings, bars 95% intervals")
    axes.grid(visible=False, axis="y")
    for height, row in enumerate(rows):
        _draw_row(axes, height, row)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if linear_accuracy is not None:
        axes.axvline(
            100 * linear_accuracy,
            color=VERMILLION,
            linestyle="--",
            linewidth=1.6,
            label=f"linear model ({linear_accuracy:.1%})",
        )
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def _draw_row(axes: Axes, height: int, row: NetworkAccuracies) -> None:
    colour = _GROUP_COLOURS.get(row.group, ORANGE)
    interval = mean_interval([100 * accuracy for accuracy in row.accuracies])
    axes.scatter(
        [100 * accuracy for accuracy in row.accuracies],
        [height] * interval.n,
        s=26,
        color=colour,
        alpha=0.55,
        linewidth=0,
        label=row.group,
        zorder=3,
    )
    # below the dots, so that neither hides the other
    if not math.isnan(interval.low):
        axes.plot([interval.low, interval.high], [height + 0.22] * 2, color=colour, linewidth=2)
    axes.plot([interval.mean], [height + 0.22], marker="D", color=colour, markersize=6)


def _number_cells(axes: Axes, shares: np.ndarray) -> None:
    """Percentages in the cells that have any, white on dark and black on light."""
    size = 10 if len(shares) <= 12 else 8
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if share > 0.5 else "black",
            )

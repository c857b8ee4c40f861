"""What all pictures share: colours that colour-blind readers tell apart, and quiet axes."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette; yellow is left out, since it drowns on white
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, ORANGE, PURPLE = "#D55E00", "#E69F00", "#CC79A7"
BLACK, GREY, PALE = "#000000", "#767676", "#D9D9D9"

_DOTS_PER_INCH = 160
_WIDTH = 10  # inches


@dataclass(frozen=True)
class Family:
    """Operations that a reader takes for one kind; they share a colour in every picture."""

    name: str
    colour: str


_FAMILIES = {
    "sep": Family("separable convolution", BLUE),
    "dil": Family("dilated convolution", GREEN),
    "max": Family("pooling", VERMILLION),
    "avg": Family("pooling", VERMILLION),
    "skip": Family("skip connection", BLACK),
    "none": Family("none", GREY),
}
_OTHER = Family("other operation", PURPLE)


def family_of(operation: str) -> Family:
    """The family of an operation by the first word of its name, e.g. ``sep_conv_3x3``."""
    return _FAMILIES.get(operation.split("_")[0], _OTHER)


def short_name(operation: str) -> str:
    """``sep_conv_3x3`` as "sep 3×3", ``skip_connect`` as "skip"."""
    words = operation.split("_")
    size = words[-1].replace("x", "×")
    return f"{words[0]} {size}" if size[0].isdigit() else words[0]


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A white figure of ``height`` inches, and its axes row by row."""
    figure = Figure((_WIDTH, height), _DOTS_PER_INCH, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def quiet(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Name the axes, keep the two spines that carry numbers, and add a pale grid."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def count_epochs(axes: Axes) -> None:
    """Whole numbers on the x axis."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

"""How far data sets are from one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from pipeline.figures.style import BLUE, GREY, PALE, VERMILLION, new_figure, quiet

_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # names stay legible on lines
_NUMBERED_SETS = 16  # more cells than this squared are too small for numbers


def draw_distances(matrix: ArrayLike, names: Sequence[str]) -> Figure:
    """A heat map of distances [sets, sets]; the nearest other set of each row is framed."""
    distances = np.asarray(matrix, dtype=np.float64)
    figure, (axes,) = new_figure(8.6)
    # the diagonal is zero always: with it, the others would hardly differ in colour
    others = np.ma.masked_array(distances, np.eye(len(distances), dtype=bool))
    image = axes.imshow(others, cmap="Blues_r")
    axes.set_title("distance between data sets", loc="left", fontsize=12, fontweight="bold")
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    for row, column in enumerate(nearest(distances)):
        corner = (column - 0.5, row - 0.5)
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor=VERMILLION, linewidth=2.5, zorder=3)
        frame.set_clip_on(False)  # at the edges half of it would be
        axes.add_patch(frame)
    if len(names) <= _NUMBERED_SETS:
        middle = (others.min() + others.max()) / 2
        for (row, column), value in np.ma.ndenumerate(others):
            colour = "black" if value >= middle else "white"
            axes.text(
                column, row, f"{value:.4g}", ha="center", va="center", fontsize=10, color=colour
            )
    figure.colorbar(
        image, shrink=0.8, label="OTDD (units of the features); framed: nearest in a row"
    )
    return figure


def draw_map(matrix: ArrayLike, names: Sequence[str]) -> Figure:
    """The sets as points of a plane whose distances are as near to ``matrix`` as it allows.

    Each is joined with its nearest other set by the true distances, which the plane may bend.
    """
    distances = np.asarray(matrix, dtype=np.float64)
    places, share = planar_map(distances)
    figure, (axes,) = new_figure(7.0)
    title = f"data sets and their nearest (the plane shows {share:.0%} of the squared distances)"
    quiet(axes, title)
    for own, other in enumerate(nearest(distances)):
        joined = places[[own, other]]
        axes.plot(joined[:, 0], joined[:, 1], color=PALE, linewidth=2, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], s=60, color=BLUE, zorder=2)
    for name, place in zip(names, places, strict=True):
        axes.annotate(name, place, xytext=(7, 5), textcoords="offset points", bbox=_PAPER)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.tick_params(colors=GREY)
    return figure


def planar_map(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Classical multidimensional scaling (Torgerson 1952): places [n, 2], and their share.

    The share (0..1) is of the absolute eigenvalues of the centred squares: 1 where the sets lie in
    a plane.
    """
    n = len(distances)
    centring = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centring @ np.square(distances) @ centring)
    kept = np.maximum(values[-2:][::-1], 0)  # ascending; the largest first
    places = vectors[:, -2:][:, ::-1] * np.sqrt(kept)
    total = np.abs(values).sum()
    return places, float(kept.sum() / total) if total > 0 else 1.0


def nearest(distances: np.ndarray) -> list[int]:
    """For each set, the number of the nearest other one."""
    others = np.where(np.eye(len(distances), dtype=bool), np.inf, distances)
    return [int(column) for column in others.argmin(axis=1)]

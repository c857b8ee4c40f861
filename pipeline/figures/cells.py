"""Cells as arc diagrams: states on a line, one arc an operation, so that no label can hide.

An arc rises above the middle of its two states by their distance, so that no two arcs share an
apex; arcs from odd states rise a little more, so that neighbours of one length are not level. The
labels stand at the apexes and therefore never overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from pipeline.figures.style import BLACK, GREY, PALE, family_of, new_figure, quiet, short_name

if TYPE_CHECKING:
    from nas.spaces.darts.genotype import Gene, Genotype

_HALF_WIDTH, _HALF_HEIGHT = 0.3, 0.26  # of a state's box
_PORT = 0.13  # arcs arrive left of a box's middle and leave right of it
_STAGGER = 0.36  # an arc from an odd state rises this much more
_BUS = -0.85  # height of the line that gathers the nodes into the output


def draw_cells(genotype: Genotype) -> Figure:
    """The normal and the reduction cell side by side.

    Above the states, an arrow per gene with its operation; below them, the line that concatenates
    the nodes into the output.
    """
    figure, (normal, reduce) = new_figure(4.4, columns=2)
    _draw_cell(normal, "normal cell", genotype.normal)
    _draw_cell(reduce, "reduction cell", genotype.reduce)
    operations = [gene.operation for gene in genotype.normal + genotype.reduce]
    families = dict.fromkeys(family_of(operation) for operation in sorted(operations))
    handles = [Line2D([], [], color=f.colour, linewidth=3, label=f.name) for f in families]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_cell(axes: Axes, title: str, genes: Sequence[Gene]) -> None:
    nodes = range(2, 2 + len(genes) // 2)
    output = nodes.stop + 0.15
    quiet(axes, title)
    axes.axis("off")
    axes.set_xlim(-0.45, output + 0.45)
    axes.set_ylim(_BUS - 0.35, nodes.stop - 0.1)
    for position, gene in enumerate(genes):
        _draw_arc(axes, gene.operation, gene.source, nodes[position // 2])
    _draw_bus(axes, nodes, output)
    _draw_state(axes, 0, "$c_{k-2}$", PALE)
    _draw_state(axes, 1, "$c_{k-1}$", PALE)
    for node in nodes:
        _draw_state(axes, node, str(node - 2), "white")
    _draw_state(axes, output, "$c_k$", PALE)


def _draw_state(axes: Axes, x: float, name: str, fill: str) -> None:
    corner = (x - _HALF_WIDTH, -_HALF_HEIGHT)
    box = FancyBboxPatch(
        corner,
        2 * _HALF_WIDTH,
        2 * _HALF_HEIGHT,
        "round,pad=0,rounding_size=0.08",
        facecolor=fill,
        edgecolor=BLACK,
        zorder=4,
    )
    axes.add_patch(box)
    axes.text(x, 0, name, ha="center", va="center", fontsize=11, zorder=5)


def _draw_arc(axes: Axes, operation: str, source: int, node: int) -> None:
    colour, middle = family_of(operation).colour, (source + node) / 2
    apex = node - source + _STAGGER * (source % 2)
    start, end = (source + _PORT, _HALF_HEIGHT), (node - _PORT, _HALF_HEIGHT)
    control = (middle, 2 * apex - _HALF_HEIGHT)  # a quadratic curve rises half way to it
    path = Path([start, control, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    axes.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linewidth=1.6,
            zorder=2,
            fill=False,
        )
    )
    axes.text(
        middle,
        apex,
        short_name(operation),
        color=colour,
        fontsize=9.5,
        ha="center",
        va="center",
        zorder=3,
        gid="operation",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
    )


def _draw_bus(axes: Axes, nodes: range, output: float) -> None:
    for node in nodes:
        axes.plot([node, node], [0, _BUS], color=GREY, linewidth=1.2, zorder=1)
    axes.plot([nodes.start, output], [_BUS, _BUS], color=GREY, linewidth=1.2, zorder=1)
    axes.annotate(
        "",
        (output, -_HALF_HEIGHT),
        (output, _BUS),
        zorder=1,
        arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0},
    )
    axes.text(
        (nodes.start + nodes.stop - 1) / 2,
        _BUS,
        "concatenate",
        ha="center",
        va="center",
        color=GREY,
        fontsize=9.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )

"""What changes over epochs: architecture parameters, searches and trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from nas.observer import EpochRecord
from pipeline.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    count_epochs,
    family_of,
    new_figure,
    quiet,
    short_name,
)

_MARKED_EPOCHS = 12  # a curve this short shows its points, so that one epoch is not invisible


def draw_alphas(history: ArrayLike, operations: Sequence[str]) -> Figure:
    """Mixing weights of both cells over the epochs of a search.

    Args:
        history: [epochs, 2, edges, operations], the normal cell first.
        operations: names of the last axis.

    Each line is an operation's mean over the edges, its band the smallest and largest edge.
    """
    weights = np.asarray(history, dtype=np.float64)
    figure, panels = new_figure(4.4, columns=2)
    for cell, axes in enumerate(panels):
        quiet(
            axes, ("normal cell", "reduction cell")[cell], y="mixing weight: mean, range over edges"
        )
        seen: set[str] = set()
        for index, operation in enumerate(operations):
            family = family_of(operation)
            # the second of a family, e.g. the 5x5 convolution, is dashed
            dashes = "--" if family.name in seen else "-"
            seen.add(family.name)
            _draw_range(axes, weights[:, cell, :, index], operation, family.colour, dashes)
        count_epochs(axes)
        axes.set_ylim(0, 1.05 * weights.max())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=8,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.7,
    )
    return figure


def draw_search_curves(records: Sequence[EpochRecord]) -> Figure:
    """Loss, accuracy, entropy of alphas and skip connections over a search's epochs."""
    figure, (loss, accuracy, entropy, skips) = new_figure(6.4, rows=2, columns=2)
    quiet(loss, "loss", y="cross-entropy")
    _draw_metric(loss, records, "supernet/train_loss", "train", BLUE)
    _draw_metric(loss, records, "supernet/val_loss", "validation", VERMILLION)

    quiet(accuracy, "accuracy", y="top-1 (%)")
    _draw_metric(accuracy, records, "supernet/train_accuracy", "train", BLUE, scale=100)
    _draw_metric(accuracy, records, "supernet/val_accuracy", "validation", VERMILLION, scale=100)
    _draw_metric(
        accuracy, records, "supernet/discretised_accuracy", "discretised", GREEN, "--", scale=100
    )

    quiet(entropy, "entropy of alphas", y="mean over edges (nats)")
    _draw_metric(entropy, records, "alpha/entropy_normal", "normal cell", BLUE)
    _draw_metric(entropy, records, "alpha/entropy_reduce", "reduction cell", ORANGE, "--")

    quiet(skips, "skip connections", y="in the derived cell")
    _draw_metric(skips, records, "skip/normal", "normal cell", BLUE)
    _draw_metric(skips, records, "skip/reduce", "reduction cell", ORANGE, "--")
    skips.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    skips.set_ylim(bottom=-0.2)
    for axes in (loss, accuracy, entropy, skips):
        count_epochs(axes)
        _add_legend(axes)
    return figure


def draw_learning_curves(trainings: Mapping[str, Sequence[EpochRecord]]) -> Figure:
    """Training loss and validation accuracy of several trainings by name.

    Names that start with "random" are drawn in grey and share one legend entry; the others are
    the transferred networks.
    """
    figure, (loss, accuracy) = new_figure(4.2, columns=2)
    quiet(loss, "training loss", y="cross-entropy")
    quiet(accuracy, "validation accuracy", y="top-1 (%)")
    # random networks first, so that they lie underneath
    for name in sorted(trainings, key=lambda name: not name.startswith("random")):
        colour = GREY if name.startswith("random") else BLUE
        kind = "random" if name.startswith("random") else "transferred"
        _draw_metric(loss, trainings[name], "train/loss", kind, colour)
        _draw_metric(accuracy, trainings[name], "val/accuracy", kind, colour, scale=100)
    for axes in (loss, accuracy):
        count_epochs(axes)
        _add_legend(axes)
    return figure


def _draw_range(axes: Axes, weights: np.ndarray, operation: str, colour: str, dashes: str) -> None:
    """``weights``: [epochs, edges] of one operation."""
    epochs = np.arange(len(weights))
    axes.fill_between(
        epochs, weights.min(axis=1), weights.max(axis=1), color=colour, alpha=0.05, linewidth=0
    )
    axes.plot(
        epochs,
        weights.mean(axis=1),
        color=colour,
        linestyle=dashes,
        linewidth=1.8,
        marker=_marker(len(weights)),
        markersize=3.5,
        label=short_name(operation),
    )


def _draw_metric(
    axes: Axes,
    records: Sequence[EpochRecord],
    metric: str,
    label: str,
    colour: str,
    dashes: str = "-",
    scale: float = 1,
) -> None:
    """One line through the records that have ``metric``, which may be measured now and then."""
    points = [(r.epoch, scale * r.metrics[metric]) for r in records if metric in r.metrics]
    if points:
        epochs, values = zip(*points, strict=True)
        axes.plot(
            epochs,
            values,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            label=label,
            marker=_marker(len(points)),
            markersize=4,
        )


def _marker(epochs: int) -> str:
    return "o" if epochs <= _MARKED_EPOCHS else ""


def _add_legend(axes: Axes) -> None:
    """A legend with each label once; none where nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), frameon=False, loc="best")

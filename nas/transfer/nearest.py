"""Which supernet of a zoo a search should begin with: the nearest that may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nas.errors import ConfigurationError
from nas.transfer.otdd import DatasetSketch, distance
from nas.transfer.zoo import Card, overlap

MAX_OVERLAP = 0.01  # share of the target's images; fewer are pictures that many sets have

Distance = Callable[[DatasetSketch, DatasetSketch], float]


@dataclass(frozen=True, eq=False)
class Target:
    """What must be known of the data set that a search is about to be for."""

    name: str
    digest: str
    hashes: Tensor
    sketch: DatasetSketch


@dataclass(frozen=True)
class Standing:
    """Where one supernet stands for a target.

    Attributes:
        name: of the supernet, for people.
        sources: what it was searched on.
        distance: to the nearest of its sources; infinite where none has a sketch.
        overlap: share (0..1) of the target's images that it, or what it began with, was searched
            on.
        refused: why it may not be taken; empty where it may.
    """

    name: str
    sources: tuple[str, ...]
    distance: float
    overlap: float
    refused: str


def appraise(
    name: str,
    card: Card,
    hashes: Tensor,
    sketches: Sequence[DatasetSketch],
    target: Target,
    measure: Distance = distance,
) -> Standing:
    """Where a supernet stands for ``target``.

    One that was searched on several sets is as near as the nearest of them. One that was searched
    on the target itself, or on a set that shares more than ``MAX_OVERLAP`` of the target's images,
    may not be taken: it would show how well a set teaches itself. The images of the supernets that
    it began with, and those that they began with, count as its own.
    """
    sources = tuple(source.name for source in card.sources)
    share = overlap(target.hashes, hashes)
    refused = ""
    if any(s.digest == target.digest or s.name == target.name for s in card.sources):
        refused = "searched on the target itself"
    elif share > MAX_OVERLAP:
        refused = f"it, or what it began with, was searched on {share:.1%} of the target's images"
    distances = []
    for sketch in sketches:
        try:
            distances.append(measure(sketch, target.sketch))
        except ConfigurationError:  # described in another way: no distance can be had
            continue
    return Standing(name, sources, min(distances, default=math.inf), share, refused)


def rank(standings: Iterable[Standing]) -> list[Standing]:
    """The nearest first; those that may not be taken last.

    Of equally near ones the one of more sources stands first (multi-data-set pretraining is what
    the paper recommends), then the one that came first.
    """
    return sorted(standings, key=lambda s: (bool(s.refused), s.distance, -len(s.sources)))

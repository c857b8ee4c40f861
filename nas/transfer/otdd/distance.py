"""The optimal transport data-set distance (Alvarez-Melis and Fusi, NeurIPS 2020).

**Convention.** A labelled image z = (x, y) is its embedding x and the distribution alpha_y of its
class in the embedding. The ground cost is

    c(z, z') = |x - x'|^2 + W2^2(alpha_y, alpha_y')

and the squared distance is the least mean cost over all couplings of the two sets. No term is
halved (the authors' code halves both, so that its value is half of our square), and
:func:`distance` is the root: a metric, in the units of the features. Moving a set by t gives the
square 2 |t|^2, once for the images and once for their classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nas.errors import ConfigurationError, UnknownNameError
from nas.transfer.otdd.labels import LABEL_DISTANCES, squared_distances
from nas.transfer.otdd.sketch import DatasetSketch
from nas.transfer.otdd.transport import exact_cost

OUTER = {"exact": "the linear programme, solved by the network simplex"}


@dataclass(frozen=True)
class OTDDConfig:
    """How a distance is computed.

    Attributes:
        labels: distance between classes: "gaussian" (Bures-Wasserstein), "diagonal" (the same
            with diagonal covariances), "means", or "exact" (between the classes' points).
        outer: how the transport between the sets is solved: "exact".
    """

    labels: str = "gaussian"
    outer: str = "exact"

    def __post_init__(self) -> None:
        if self.labels not in LABEL_DISTANCES:
            raise UnknownNameError("label distance", self.labels, LABEL_DISTANCES)
        if self.outer not in OUTER:
            raise UnknownNameError("outer problem", self.outer, OUTER)


def distance(a: DatasetSketch, b: DatasetSketch, config: OTDDConfig | None = None) -> float:
    """OTDD of two sketches, in units of the features; see the module for the convention.

    Raises:
        ConfigurationError: the sketches were made with different embeddings.
    """
    return math.sqrt(squared_distance(a, b, config or OTDDConfig()))


def squared_distance(a: DatasetSketch, b: DatasetSketch, config: OTDDConfig) -> float:
    """The square of :func:`distance`."""
    if a.embedding != b.embedding:
        raise ConfigurationError(
            f"'{a.name}' and '{b.name}' were described with different embeddings "
            f"({a.embedding[:8]} and {b.embedding[:8]}): distances need one for both"
        )
    labels = LABEL_DISTANCES[config.labels](a, b)  # [K, L]
    cost = squared_distances(a.points, b.points).add_(labels[a.labels][:, b.labels])
    return exact_cost(a.weights, b.weights, cost)

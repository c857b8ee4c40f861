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

import torch
from torch import Tensor

from nas.errors import ConfigurationError, UnknownNameError
from nas.transfer.otdd.labels import LABEL_DISTANCES, deviations, squared_distances
from nas.transfer.otdd.sketch import DatasetSketch
from nas.transfer.otdd.transport import entropic_cost, exact_cost, sliced_cost

EXACT, ENTROPIC, SLICED = "exact", "entropic", "sliced"
OUTER = {
    EXACT: "the cheapest coupling, by the network simplex",
    ENTROPIC: "the Sinkhorn divergence, which is smooth and biased no more",
    SLICED: "the mean over lines, for sets of many points",
}
PROJECTIONS = 500  # directions of the sliced form, rounded up to whole bases


@dataclass(frozen=True)
class OTDDConfig:
    """How a distance is computed.

    Attributes:
        labels: distance between classes: "gaussian" (Bures-Wasserstein), "diagonal" (the same
            with diagonal covariances), "means", or "exact" (between the classes' points).
        outer: how the transport between the sets is solved. "exact" is the distance itself.
            "entropic" is regularised. "sliced" is the sliced 2-Wasserstein distance (Bonneel et
            al. 2015, over orthonormal bases) of the vectors [x, mean_y, deviation_y], whose
            plain one is OTDD with diagonal covariances: a lower bound of it in O(n log n). (The
            s-OTDD of arXiv 2501.18901 projects classes by their moments instead.) It takes
            "diagonal" or "means".
        regularisation: of "entropic", as a share of the mean ground cost between the two sets.
        debiased: "entropic" takes off the mean cost of carrying either set to itself, so that
            equal sets have distance 0.
    """

    labels: str = "gaussian"
    outer: str = EXACT
    regularisation: float = 0.1
    debiased: bool = True

    def __post_init__(self) -> None:
        if self.labels not in LABEL_DISTANCES:
            raise UnknownNameError("label distance", self.labels, LABEL_DISTANCES)
        if self.outer not in OUTER:
            raise UnknownNameError("outer problem", self.outer, OUTER)
        if self.outer == SLICED and self.labels not in ("diagonal", "means"):
            raise ConfigurationError(
                f"the sliced form needs classes that are vectors: take the label distance "
                f"'diagonal' or 'means', not '{self.labels}'"
            )
        if not 0 < self.regularisation < math.inf:
            raise ConfigurationError(
                f"the regularisation is a positive share of the mean cost, not "
                f"{self.regularisation}"
            )


def distance(a: DatasetSketch, b: DatasetSketch, config: OTDDConfig | None = None) -> float:
    """OTDD of two sketches, in units of the features; see the module for the convention.

    Raises:
        ConfigurationError: the sketches were made with different embeddings.
        NASError: the transport could not be solved.
    """
    return math.sqrt(squared_distance(a, b, config or OTDDConfig()))


def squared_distance(a: DatasetSketch, b: DatasetSketch, config: OTDDConfig) -> float:
    """The square of :func:`distance`."""
    if a.embedding != b.embedding:
        raise ConfigurationError(
            f"'{a.name}' and '{b.name}' were described with different embeddings "
            f"({a.embedding[:8]} and {b.embedding[:8]}): distances need one for both"
        )
    if config.outer == SLICED:
        x, y = _vectors(a, config.labels), _vectors(b, config.labels)
        return sliced_cost(a.weights, b.weights, x, y, projections=PROJECTIONS, seed=0)
    if config.outer == ENTROPIC:
        return _entropic(a, b, config)
    return exact_cost(a.weights, b.weights, ground_cost(a, b, config.labels))


def ground_cost(a: DatasetSketch, b: DatasetSketch, labels: str) -> Tensor:
    """c(z, z') between all points of two sketches, float64 [n, m], in squared feature units."""
    between_classes = LABEL_DISTANCES[labels](a, b)  # [K, L]
    return squared_distances(a.points, b.points).add_(between_classes[a.labels][:, b.labels])


def _entropic(a: DatasetSketch, b: DatasetSketch, config: OTDDConfig) -> float:
    """The Sinkhorn divergence of Feydy et al. (AISTATS 2019), with one epsilon for all terms."""
    cost = ground_cost(a, b, config.labels)
    epsilon = config.regularisation * float(a.weights @ cost @ b.weights)
    if epsilon == 0:  # all points of both sets are one
        return 0.0
    value = entropic_cost(a.weights, b.weights, cost, epsilon)
    if config.debiased:
        for own in (a, b):
            cost = ground_cost(own, own, config.labels)
            value -= entropic_cost(own.weights, own.weights, cost, epsilon) / 2
    return max(0.0, value)


def _vectors(sketch: DatasetSketch, labels: str) -> Tensor:
    """The points with what is known of their classes, float64 [m, 2 d or 3 d]."""
    parts = [sketch.points.double(), sketch.means.double()[sketch.labels]]
    if labels == "diagonal":
        parts.append(deviations(sketch)[sketch.labels])
    return torch.cat(parts, dim=1)

"""Distances between classes: the label part of OTDD's ground cost, always squared.

A class is the distribution of its features. With K and L classes every function gives float64
[K, L], in squared units of the features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ot
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nas.transfer.otdd.sketch import DatasetSketch


def bures_squared(first: Tensor, second: Tensor) -> Tensor:
    """Squared Bures distance of covariances ``F.T @ F``, given their factors [..., r, d].

    tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2), whose last trace is the sum of the singular
    values of F1 F2^T: both have the eigenvalues of F2 S1 F2^T. No root of a matrix is taken, so
    nothing is lost where covariances are singular, and r instead of d decides what it costs.
    """
    traces = first.square().sum((-2, -1)) + second.square().sum((-2, -1))
    overlap = torch.linalg.svdvals(first @ second.mT).sum(-1)
    return (traces - 2 * overlap).clamp_min(0)


def gaussian(a: DatasetSketch, b: DatasetSketch) -> Tensor:
    """Squared 2-Wasserstein distance of the Gaussians with the classes' means and covariances."""
    # rows of zeros change neither traces nor singular values
    theirs = pad_sequence([f.double() for f in b.class_factors], batch_first=True)  # [L, r, d]
    rows = [bures_squared(factor.double(), theirs) for factor in a.class_factors]
    return means_only(a, b) + torch.stack(rows)


def diagonal(a: DatasetSketch, b: DatasetSketch) -> Tensor:
    """The same of Gaussians with the covariances' diagonals alone."""
    return means_only(a, b) + squared_distances(deviations(a), deviations(b))


def means_only(a: DatasetSketch, b: DatasetSketch) -> Tensor:
    """Squared distance of the classes' means."""
    return squared_distances(a.means, b.means)


def exact(a: DatasetSketch, b: DatasetSketch) -> Tensor:
    """Squared 2-Wasserstein distance of the classes' points, without a model of them."""
    ours, theirs = _points_by_class(a), _points_by_class(b)
    distances = np.array(
        [[ot.emd2([], [], squared_distances(x, y).numpy()) for y in theirs] for x in ours]
    )
    return torch.from_numpy(distances)


LABEL_DISTANCES: dict[str, Callable[[DatasetSketch, DatasetSketch], Tensor]] = {
    "gaussian": gaussian,
    "diagonal": diagonal,
    "means": means_only,
    "exact": exact,
}


def deviations(sketch: DatasetSketch) -> Tensor:
    """Standard deviation of each feature in each class, float64 [K, d]."""
    variances = [factor.double().square().sum(0) for factor in sketch.class_factors]
    return torch.stack(variances).sqrt()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances float64 [n, m] of rows; exactly 0 between equal rows."""
    exactly = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.double(), y.double(), compute_mode=exactly).square_()


def _points_by_class(sketch: DatasetSketch) -> list[Tensor]:
    return [sketch.points[sketch.labels == label] for label in range(len(sketch.classes))]

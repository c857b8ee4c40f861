"""A linear classifier of features that are given: where a new head on an old trunk begins.

A head that begins at random throws the trunk about while it learns what one convex problem says at
once: linear probing before fine-tuning (Kumar et al., ICLR 2022, arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import Batch
from nas.spaces.base import LinearClassifier

PENALTY = 0.01  # on the squared weights: of 0.001, 0.01 and 0.1 the best on small real sets
ITERATIONS = 100
MOST_IMAGES = 10_000  # to fit on: more hardly move a classifier of a few hundred features


def fit_heads(
    classifier: LinearClassifier,
    features: Callable[[Tensor], Tensor],
    sets: Iterable[Iterable[Batch]],
) -> None:
    """Fit ``classifier`` to the features of some batches of every data set.

    Each set's batches name its head; the first ``MOST_IMAGES`` images count.

    Args:
        features: images to what the classifier is given, [N, D]. As everywhere in a search,
            normalised by the statistics of their batch, and without a trace in running ones.
    """
    for batches in sets:
        known, labels = [], []
        head = slice(None)
        for batch in batches:
            with torch.no_grad():
                known.append(features(batch.images))
            labels.append(batch.labels)
            head = head if batch.head is None else batch.head
            if sum(map(len, labels)) >= MOST_IMAGES:
                break
        matrix, bias = classifier.matrix[:, head], classifier.bias[head]
        fitted = fit_classifier(torch.cat(known), torch.cat(labels), len(bias))
        matrix.copy_(fitted[0])
        bias.copy_(fitted[1])


def fit_classifier(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with a squared penalty on its weights, by L-BFGS.

    Features are standardised for the fit; the result takes them as they are.

    Args:
        features: float [N, D].
        labels: int64 [N], in 0..classes - 1; classes without an image are allowed.

    Returns:
        Matrix [D, classes] and bias [classes]: scores are ``features @ matrix + bias``.
    """
    mean, deviation = features.mean(0), features.std(0, unbiased=False) + 1e-6
    scaled = (features - mean) / deviation
    matrix = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [matrix, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        value = F.cross_entropy(scaled @ matrix + bias, labels) + PENALTY * matrix.square().sum()
        matrix.grad, bias.grad = torch.autograd.grad(value, [matrix, bias])
        return value

    optimiser.step(loss)
    with torch.no_grad():
        unscaled = matrix / deviation[:, None]
        return unscaled, bias - mean @ unscaled

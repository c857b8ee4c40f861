"""Logistic regression on pixels: what a task yields without any network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data.splits import balanced_subset
from nas.data.task import ImageStore, ImageTask, SplitName
from nas.randomness import generator

MAX_IMAGES = 5000  # of the training split
MAX_SIDE = 32  # pixels
MAX_ITERATIONS = 200
INVERSE_PENALTY = 0.01  # pixels are many and alike, images few: without a strong one it overfits


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A linear map of standardised pixels to class scores."""

    mean: np.ndarray  # [pixels]
    scale: np.ndarray  # [pixels]
    weight: np.ndarray  # [classes, pixels]
    bias: np.ndarray  # [classes]

    def accuracy(self, task: ImageTask, split: SplitName) -> float:
        """Top-1 accuracy, 0..1, on one split of the task it was fitted to."""
        indices: Tensor = getattr(task.splits, split)
        right = 0
        for chunk in indices.split(256):
            features = (_pixels(task.images, chunk) - self.mean) / self.scale
            scores = features @ self.weight.T + self.bias
            right += int((scores.argmax(axis=1) == task.labels[chunk].numpy()).sum())
        return right / len(indices)


def fit_linear(task: ImageTask) -> LinearModel:
    """Logistic regression on at most 5,000 training images of at most 32 pixels a side.

    Takes seconds and is deterministic; sees the training split only.
    """
    from sklearn.linear_model import LogisticRegression  # seconds to import

    train = task.splits.train
    chosen = train[balanced_subset(task.labels[train], MAX_IMAGES, generator(0, "linear"))]
    pixels = np.concatenate([_pixels(task.images, chunk) for chunk in chosen.split(256)])
    mean, scale = pixels.mean(axis=0), pixels.std(axis=0)
    scale[scale < 1e-6] = 1.0  # pixels that never change, e.g. the border of digits
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # a baseline that has not converged to the last digit is as good a baseline
        warnings.simplefilter("ignore")
        model.fit((pixels - mean) / scale, task.labels[chosen].numpy())
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # two classes: one score, whose sign decides
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    return LinearModel(mean, scale, weight, bias)


def _pixels(images: ImageStore, indices: Tensor) -> np.ndarray:
    """float32 [n, pixels] in 0..1, shrunk to at most 32 pixels a side."""
    batch = images.gather(indices).float() / 255
    height, width = batch.shape[2:]
    shrink = MAX_SIDE / max(height, width)
    if shrink < 1:
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
    return torch.flatten(batch, 1).numpy()

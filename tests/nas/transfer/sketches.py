"""Small sets of labelled points, sketched, for the tests of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from nas.randomness import generator
from nas.transfer.otdd import DatasetSketch, summarise


def sketch_of(features: Tensor, labels: Tensor, name: str = "set", seed: int = 0) -> DatasetSketch:
    """The whole set as a sketch; float64 features keep every digit."""
    return summarise(
        features,
        labels,
        name=name,
        data_digest=name,
        embedding="test",
        seed=seed,
        classes=tuple(f"class {k}" for k in range(int(labels.max()) + 1)),
        points=len(features),
    )


def blobs(
    seed: int, classes: int = 3, images: int = 8, dimensions: int = 4
) -> tuple[Tensor, Tensor]:
    """Classes of correlated Gaussian points around random centres: features, labels."""
    draw = generator(seed, "blobs")
    features = []
    for _ in range(classes):
        centre = 2 * torch.randn(dimensions, generator=draw, dtype=torch.float64)
        mix = torch.randn(dimensions, dimensions, generator=draw, dtype=torch.float64)
        noise = torch.randn(images, dimensions, generator=draw, dtype=torch.float64)
        features.append(centre + noise @ mix)
    return torch.cat(features), torch.arange(classes).repeat_interleave(images)

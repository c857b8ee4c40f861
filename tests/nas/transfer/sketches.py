"""Small sets of labelled points and images, for the tests of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from nas.data import ImageTask, Splits, TensorImages
from nas.data.task import task_digest
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


def task_of(pixels: Tensor, labels: Tensor, name: str = "set") -> ImageTask:
    """A task of uint8 ``pixels`` [N, C, H, W] whose every image is for training."""
    images, classes = (
        TensorImages(pixels),
        tuple(f"class {k}" for k in range(int(labels.max()) + 1)),
    )
    none = torch.zeros(0, dtype=torch.int64)
    splits = Splits(torch.arange(len(labels)), none, none)
    return ImageTask(
        name=name,
        description="a set of the tests",
        images=images,
        labels=labels,
        classes=classes,
        splits=splits,
        mean=(0.5,) * pixels.shape[1],
        std=(0.25,) * pixels.shape[1],
        flip=False,
        examples=pixels[:1],
        digest=task_digest(images, labels, classes, splits, flip=False),
    )


def noise_task(
    seed: int, sizes: tuple[int, ...] = (8, 8, 8), channels: int = 1, side: int = 8
) -> ImageTask:
    """Classes of noise, so many images each."""
    draw = generator(seed, "noise")
    pixels = torch.randint(256, (sum(sizes), channels, side, side), generator=draw)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return task_of(pixels.to(torch.uint8), labels, f"noise {seed}")

"""The values of the data room: an image classification task, its splits, and its pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True, eq=False)
class Splits:
    """Image numbers of each split: int64, sorted, disjoint."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclass(frozen=True)
class TaskShape:
    """What a network must know of a task. ``height`` and ``width`` are in pixels."""

    channels: int
    height: int
    width: int
    classes: int


class ImageStore(Protocol):
    """Where the pixels are: in memory (:class:`TensorImages`) or in files (``FileImages``)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Tensor:
        """uint8 [n, C, H, W] of the images ``indices`` [n]. Raises DataError if one is broken."""

    def fingerprints(self) -> Sequence[bytes]:
        """A SHA-256 of each image's content; equal exactly where two images are identical."""

    def originals(self, indices: Tensor) -> list[Tensor]:
        """Images as they came, before any scaling: uint8 [C, H', W'], each of its own size.

        Raises DataError if one is broken.
        """

    def origins(self) -> Sequence[bytes]:
        """Fingerprints of the images as they came."""

    def subset(self, indices: Tensor) -> ImageStore:
        """Only the images of ``indices`` [n], in that order."""


class TensorImages:
    """All images of a small set in memory, uint8 [N, C, H, W].

    ``source`` has the images as they came, where the pixels are not.
    """

    def __init__(self, pixels: Tensor, source: ImageStore | None = None) -> None:
        self.pixels = pixels
        self._source = source

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def gather(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    def fingerprints(self) -> Sequence[bytes]:
        return self._fingerprints

    def originals(self, indices: Tensor) -> list[Tensor]:
        if self._source is not None:
            return self._source.originals(indices)
        return list(self.gather(indices))

    def origins(self) -> Sequence[bytes]:
        return self._fingerprints if self._source is None else self._source.fingerprints()

    def subset(self, indices: Tensor) -> TensorImages:
        source = None if self._source is None else self._source.subset(indices)
        return TensorImages(self.pixels[indices], source)

    @cached_property
    def _fingerprints(self) -> list[bytes]:
        return [hashlib.sha256(image.numpy().tobytes()).digest() for image in self.pixels]


@dataclass(frozen=True, eq=False)
class RawSet:
    """A set as its reader found it, before ``limit``, ``image_size`` and the cutting of splits."""

    images: Tensor | tuple[Path, ...]  # uint8 [N, C, H, W], or one file an image
    labels: Tensor  # int64 [N]
    classes: tuple[str, ...]
    description: str
    flip: bool | None  # None: decided by the number of channels, see load_task
    given: dict[SplitName, Tensor] = field(default_factory=dict)  # official splits, image numbers
    image_size: int | None = None  # the reader's default
    stream: bool = False  # files stay files, whatever their decoded size


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A labelled set of images of one size, cut into train, validation and test."""

    name: str  # as the user wrote it: "animals", "folder:pets"
    description: str  # what it is, its source and its licence
    images: ImageStore
    labels: Tensor  # int64 [N]
    classes: tuple[str, ...]
    splits: Splits
    mean: tuple[float, ...]  # per channel over the training split, pixels scaled to 0..1
    std: tuple[float, ...]  # likewise; never below MIN_STD
    flip: bool  # whether a mirrored image keeps its class
    examples: Tensor  # a few images of one size as they came, uint8 [n, C, H', W'], n at least 1
    digest: str  # SHA-256, hex, of pixels, labels, classes, splits and flip

    @property
    def shape(self) -> TaskShape:
        return TaskShape(*self.images.shape, classes=len(self.classes))


MIN_STD = 1e-3  # a constant channel must not be divided by zero


def task_digest(
    images: ImageStore, labels: Tensor, classes: tuple[str, ...], splits: Splits, flip: bool
) -> str:
    """SHA-256 (hex) of everything that decides what a network is trained and tested on."""
    header = json.dumps({"shape": images.shape, "classes": classes, "flip": flip})
    digest = hashlib.sha256(header.encode())
    for fingerprint in images.fingerprints():
        digest.update(fingerprint)
    for numbers in (labels, splits.train, splits.val, splits.test):
        digest.update(f"/{len(numbers)}/".encode())
        digest.update(numbers.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def channel_statistics(
    images: ImageStore, indices: Tensor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, pixels scaled to 0..1.

    Exact: pixel values are counted, so neither chunks nor threads change a bit of the result.
    """
    channels = images.shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for chunk in indices.split(256):
        pixels = images.gather(chunk)
        for channel in range(channels):
            counts[channel] += torch.bincount(pixels[:, channel].flatten(), minlength=256)
    weights = counts / counts.sum(dim=1, keepdim=True).double()  # [C, 256]
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weights * values).sum(dim=1)
    std = (weights * (values - mean[:, None]).square()).sum(dim=1).sqrt().clamp_min(MIN_STD)
    return tuple(mean.tolist()), tuple(std.tolist())

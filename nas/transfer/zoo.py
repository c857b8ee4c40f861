"""Supernets that others can go on from: what is kept beside the weights, and in which form.

An entry of the zoo is one file of tensors and JSON (:mod:`nas.trained`): the supernet, a card that
says how it came about, and a hash of every image that it or a supernet it began with was searched
on, by which a data set that overlaps is recognised. Sketches of its sources
(:mod:`nas.transfer.otdd`) lie beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nas.data import ImageTask
from nas.errors import CheckpointError
from nas.spaces.darts.supernet import Supernet
from nas.trained import read_supernet, save_supernet

HASHES = "image_hashes"


@dataclass(frozen=True)
class SourceCard:
    """One data set that a supernet was searched on.

    ``classes`` many columns of the classifier are its own, after those of the sources before it;
    ``mean`` and ``std`` are of its pixels in 0..1, per channel.
    """

    name: str
    digest: str
    images: int
    classes: int
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for what a file may have made up."""
        if min(self.images, self.classes, self.channels, self.height, self.width) < 1:
            raise ValueError(f"the source '{self.name}' has a size below 1")
        if not len(self.mean) == len(self.std) == self.channels or not min(self.std) > 0:
            raise ValueError(f"the source '{self.name}' has an impossible scale of its pixels")

    @staticmethod
    def of(task: ImageTask) -> SourceCard:
        """The card of ``task``."""
        return SourceCard(
            task.name,
            task.digest,
            len(task.labels),
            **asdict(task.shape),
            mean=tuple(task.mean),
            std=tuple(task.std),
        )


@dataclass(frozen=True)
class Card:
    """How a supernet came about.

    Attributes:
        method: of the search.
        seed: of all that was random in it.
        sources: what it was searched on.
        accuracies: of the supernet on the validation halves (0..1) after each epoch.
        seconds: that the search took.
    """

    method: str
    seed: int
    sources: tuple[SourceCard, ...]
    accuracies: tuple[float, ...]
    seconds: float

    def __post_init__(self) -> None:
        """Check what a file may have made up.

        Raises:
            ValueError: a field is impossible.
        """
        if not self.sources or not self.accuracies:
            raise ValueError("it names no source or no epoch")
        if not all(0 <= accuracy <= 1 for accuracy in self.accuracies):
            raise ValueError("an accuracy lies outside 0 and 1")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"a search does not take {self.seconds} seconds")

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of pixels per channel: what the stem is used to.

        Of several sources, the means of theirs, grey ones repeated in every channel.
        """
        channels = max(source.channels for source in self.sources)

        def shared(values: list[tuple[float, ...]]) -> tuple[float, ...]:
            full = [own * channels if len(own) == 1 else own for own in values]
            return tuple(map(fmean, zip(*full, strict=True)))

        return shared([s.mean for s in self.sources]), shared([s.std for s in self.sources])

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Card:
        """Read what ``dataclasses.asdict`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no card.
        """
        sources = tuple(
            SourceCard(
                name=str(source["name"]),
                digest=str(source["digest"]),
                **{
                    field: int(source[field])
                    for field in ("images", "classes", "channels", "height", "width")
                },
                mean=tuple(map(float, source["mean"])),
                std=tuple(map(float, source["std"])),
            )
            for source in value["sources"]
        )
        return Card(
            method=str(value["method"]),
            seed=int(value["seed"]),
            sources=sources,
            accuracies=tuple(map(float, value["accuracies"])),
            seconds=float(value["seconds"]),
        )


@dataclass(frozen=True, eq=False)
class ZooEntry:
    """A supernet with its card and the hashes of all images that are behind it.

    Those of its own sources (:func:`image_hashes`) and, where it began with another supernet, of
    what is behind that one: ``joint_hashes``.
    """

    supernet: Supernet
    card: Card
    hashes: Tensor


def save_entry(path: Path, entry: ZooEntry) -> None:
    """Write ``entry`` to one file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    save_supernet(path, entry.supernet, asdict(entry.card), {HASHES: entry.hashes})


def load_entry(path: Path, digest: str | None = None) -> ZooEntry:
    """Read what :func:`save_entry` wrote, on the CPU.

    Args:
        digest: what :func:`file_digest` of the file must be, where that is known.

    Raises:
        CheckpointError: the file is another one, damaged, or no entry of a zoo.
    """
    if digest is not None and path.is_file() and (found := file_digest(path)) != digest:
        raise CheckpointError(
            f"{path} is not the file that was registered: its digest begins with {found[:12]}, "
            f"and {digest[:12]} is wanted"
        )
    saved = read_supernet(path)
    try:
        card = Card.from_json(saved.about)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} has no readable card: {error}") from error
    hashes = saved.extra.get(HASHES)
    if set(saved.extra) != {HASHES} or hashes is None or not _are_hashes(hashes):
        raise CheckpointError(f"{path} lacks the sorted hashes of its sources' images")
    classes = sum(source.classes for source in card.sources)
    if classes != saved.supernet.shape.classes:
        raise CheckpointError(
            f"{path} has a classifier of {saved.supernet.shape.classes} classes, but its sources "
            f"have {classes}"
        )
    return ZooEntry(saved.supernet, card, hashes)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_hashes(*tasks: ImageTask) -> Tensor:
    """int64, sorted, without repeats: 64 bits of the SHA-256 of each image as it came.

    Of all splits, and before any scaling, so that sets overlap at whatever size they are used. An
    image that was scaled, cropped or encoded anew before it was read is another image.
    """
    origins = b"".join(fingerprint[:8] for task in tasks for fingerprint in task.images.origins())
    return torch.frombuffer(bytearray(origins), dtype=torch.int64).unique()


def joint_hashes(*hashes: Tensor) -> Tensor:
    """All of several :func:`image_hashes`, in the same form."""
    return torch.cat(hashes).unique()


def overlap(target: Tensor, source: Tensor) -> float:
    """Share (0..1) of the target's different images that occur in the source; both are hashes."""
    return float(torch.isin(target, source).double().mean())


def _are_hashes(hashes: Tensor) -> bool:
    if hashes.dtype != torch.int64 or hashes.ndim != 1 or not len(hashes):
        return False
    return bool((hashes[1:] > hashes[:-1]).all())

"""Targets and sources of a study: halves of real sets by class, as they are, inverted or turned.

The halves of a family share no image: identical pictures are dropped but for the first, and a class
is in one half only. A set made of one half may therefore be the source of one made of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from nas.data import ImageTask, TensorImages
from nas.data.archives import ARCHIVES, read_archive
from nas.data.catalog import read_raw, task_of
from nas.data.embedded import EMBEDDED
from nas.data.splits import duplicate_groups
from nas.data.task import RawSet
from nas.errors import UnknownNameError
from nas.transfer.otdd import DatasetSketch, describe, pixels
from nas.transfer.zoo import image_hashes

FAMILIES = (  # real sets of different domains that are at hand
    "cifar10-test",
    "eurosat",
    "omniglot",
    "mnist-test",
    "notmnist",
    "fashion-test",
    "animals",
)
EVEN, ODD = HALVES = ("even", "odd")  # of a family's classes in the order of their names
PLAIN, INVERTED, TURNED = CHANGES = ("plain", "inverted", "turned")


@dataclass(frozen=True)
class Domain:
    """Half of the classes of a family of images, perhaps changed: bright for dark, or turned by
    90 degrees."""

    family: str
    half: str
    change: str = PLAIN

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("family of images", self.family, [*ARCHIVES, *EMBEDDED]),
            ("half of the classes", self.half, HALVES),
            ("change of the images", self.change, CHANGES),
        ):
            if name not in known:
                raise UnknownNameError(kind, name, known)

    @property
    def name(self) -> str:
        """As in "mnist-test-odd" or "mnist-test-odd-inverted"."""
        return "-".join([self.family, self.half, *([self.change] if self.change != PLAIN else [])])


class Families:
    """Reads families of images, each once.

    Args:
        root: where the archives lie; families that came with a package need none.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, RawSet] = {}

    def __getitem__(self, name: str) -> RawSet:
        if name not in self._known:
            read = read_archive if name in ARCHIVES else read_raw
            self._known[name] = without_repeats(read(name, self._root))
        return self._known[name]


class Domains:
    """Domains of one size, made when they are first asked for.

    Args:
        side: pixels a side that all images are scaled to.
        limit: images of a domain at most, over all splits.
        test_fraction: share of them in the test split.
    """

    def __init__(self, families: Families, side: int, limit: int, test_fraction: float) -> None:
        self._families, self._side = families, side
        self._limit, self._test_fraction = limit, test_fraction
        self._known: dict[Domain, KnownDomain] = {}

    def __getitem__(self, domain: Domain) -> KnownDomain:
        if domain not in self._known:
            task = task_of(
                domain.name,
                half_of(self._families[domain.family], domain),
                image_size=self._side,
                test_fraction=self._test_fraction,
                limit=self._limit,
            )
            self._known[domain] = KnownDomain(task)
        return self._known[domain]


@dataclass(frozen=True, eq=False)
class KnownDomain:
    """A domain with what is often asked of it."""

    task: ImageTask

    @cached_property
    def sketch(self) -> DatasetSketch:
        """Of raw pixels; without the test split."""
        return describe(self.task, pixels(), 0, points=500)

    @cached_property
    def hashes(self) -> torch.Tensor:
        """Of every image as it came."""
        return image_hashes(self.task)


def without_repeats(raw: RawSet) -> RawSet:
    """Of identical images only the first, whatever their labels; without official splits."""
    assert isinstance(raw.images, torch.Tensor)
    groups = duplicate_groups(TensorImages(raw.images).fingerprints())
    first = torch.full((int(groups.max()) + 1,), len(groups))
    first.scatter_reduce_(0, groups, torch.arange(len(groups)), "amin")
    return replace(raw, images=raw.images[first], labels=raw.labels[first], given={})


def half_of(raw: RawSet, domain: Domain) -> RawSet:
    """The images of every second class, changed as ``domain`` says."""
    assert isinstance(raw.images, torch.Tensor)
    parity = HALVES.index(domain.half)
    kept = torch.nonzero(raw.labels % 2 == parity).flatten()
    images = raw.images[kept]
    if domain.change == INVERTED:
        images = 255 - images
    elif domain.change == TURNED:
        images = images.rot90(1, (2, 3)).contiguous()
    return replace(
        raw,
        images=images,
        labels=raw.labels[kept] // 2,
        classes=raw.classes[parity::2],
        description=f"{raw.description}; the {domain.half} half of the classes, {domain.change}",
    )

"""The ranking finds the set that is known to be nearest, on real images."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sketches import task_of

from nas.data import ImageTask
from nas.study.domains import EVEN, FAMILIES, INVERTED, ODD, TURNED, Domain, Domains, Families
from nas.transfer.otdd import Embedding, OTDDConfig, describe, distance, pixels, shapes
from nas.transfer.otdd import principal_components as pca

IMAGES = Path(__file__).parents[3].parent / "shared" / "data" / "images"
EUROSAT_EACH = 60  # images of each class: the archive is read from its start


def digits(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 images uint8 [N, 1, 28, 28] of an MNIST-like file and their labels."""
    with gzip.open(IMAGES / f"{name}-images-idx3-ubyte.gz") as file:
        pixels_ = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(IMAGES / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels_[:5000].copy()), torch.from_numpy(labels[:5000].copy())


def eurosat() -> tuple[torch.Tensor, torch.Tensor]:
    """Colour images [N, 3, 64, 64] of satellites, as many of each class."""
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(IMAGES / "eurosat_rgb64_500perclass.tar.xz") as archive:
        for member in archive:
            name = Path(member.name).parent.name
            if member.isfile() and member.name.lower().endswith((".jpg", ".png")):
                kept = found.setdefault(name, [])
                if len(kept) < EUROSAT_EACH:
                    data = archive.extractfile(member)
                    assert data is not None
                    kept.append(np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB")))
    images = np.stack([image for kept in found.values() for image in kept])
    labels = [label for label, kept in enumerate(found.values()) for _ in kept]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


@pytest.fixture(scope="module")
def sets() -> dict[str, ImageTask]:
    """MNIST's digits 0 to 4 by two halves, its digits 5 to 9, turned, inverted, and far sets."""
    if not IMAGES.is_dir():
        pytest.skip("the real image sets are not beside this checkout")
    images, labels = digits("mnist_t10k")
    low, high = labels < 5, labels >= 5
    half = torch.arange(len(labels)) % 2 == 0
    first, second = low & half, low & ~half
    return {
        "mnist 0-4": task_of(images[first], labels[first]),
        "its other half": task_of(images[second], labels[second]),
        "mnist 5-9": task_of(images[high], labels[high] - 5),
        "turned": task_of(images[second].rot90(1, (2, 3)), labels[second]),
        "inverted": task_of(255 - images[second], labels[second]),
        "notmnist": task_of(*digits("notmnist_t10k")),
        "fashion": task_of(*digits("fashion-mnist/t10k")),
        "eurosat": task_of(*eurosat()),
    }


def ranking(sets: dict[str, ImageTask], embedding: Embedding, config: OTDDConfig) -> list[str]:
    """The other sets, the nearest to the first one first."""
    sketches = {name: describe(task, embedding, 0, points=500) for name, task in sets.items()}
    target, *others = sketches
    return sorted(others, key=lambda name: distance(sketches[target], sketches[name], config))


@pytest.mark.parametrize(
    "config",
    [
        OTDDConfig(),
        OTDDConfig("diagonal"),
        OTDDConfig("exact"),
        OTDDConfig(outer="entropic"),
        OTDDConfig("diagonal", "sliced"),
    ],
    ids=lambda config: f"{config.labels}-{config.outer}",
)
def test_the_nearest_set_is_the_known_one(sets: dict[str, ImageTask], config: OTDDConfig) -> None:
    found = ranking(sets, pca(list(sets.values())), config)
    assert found[0] == "its other half"
    assert set(found[1:3]) == {"mnist 5-9", "turned"}
    assert set(found[3:]) == {"notmnist", "fashion", "inverted", "eurosat"}


def test_pixels_agree(sets: dict[str, ImageTask]) -> None:
    found = ranking(sets, pixels(), OTDDConfig())
    assert found[0] == "its other half"
    assert set(found[1:3]) == {"mnist 5-9", "turned"}


def test_halves_by_class_find_each_other() -> None:
    """Among the other halves of eight sets, and the inverted and the turned one."""
    if not IMAGES.is_dir():
        pytest.skip("the real image sets are not beside this checkout")
    families = (*FAMILIES, "digits")
    domains = Domains(Families(IMAGES), 14, 800, test_fraction=0.2)
    changed = [Domain("mnist-test", ODD, INVERTED), Domain("cifar10-test", ODD, TURNED)]
    sources = [*(Domain(family, ODD) for family in families), *changed]
    targets = [Domain(family, EVEN) for family in families]
    sketches = {
        domain: describe(domains[domain].task, shapes(), 0, points=300)
        for domain in (*sources, *targets)
    }
    nearest = [
        min(sources, key=lambda source: distance(sketches[source], sketches[target]))
        for target in targets
    ]
    assert [source.name for source in nearest] == [f"{family}-odd" for family in families]

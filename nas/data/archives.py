"""Image sets in the archives that they are published in, read without unpacking them."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nas.data.task import RawSet
from nas.errors import DataError

_IDX_IMAGES, _IDX_LABELS = 2051, 2049  # first four bytes: unsigned bytes in 3 and 1 dimensions

Pictures = tuple[Tensor, list[str]]  # uint8 [N, C, H, W]; the class of each


@dataclass(frozen=True)
class Archive:
    """One set: the files that it is made of, below a folder of the user's, and who reads them."""

    description: str
    files: tuple[str, ...]
    flip: bool
    read: Callable[[tuple[Path, ...]], Pictures]


def read_archive(name: str, root: Path) -> RawSet:
    """The set ``name`` of ARCHIVES from its files in ``root``; no split is given.

    Raises:
        DataError: a file is missing or broken; the message names what is expected and where.
    """
    row = ARCHIVES[name]
    paths = tuple(root / file for file in row.files)
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(
            f"the set '{name}' needs {', '.join(missing)} in '{root}': put it there, or name "
            "another folder with --data"
        )
    try:
        pixels, named = row.read(paths)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"the set '{name}' in '{root}' cannot be read: {error}") from error
    classes = tuple(sorted(set(named)))
    return RawSet(
        images=pixels,
        labels=torch.tensor([classes.index(one) for one in named]),
        classes=classes,
        description=row.description,
        flip=row.flip,
    )


def _idx(paths: tuple[Path, ...]) -> Pictures:
    images, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    for content, magic in ((images, _IDX_IMAGES), (labels, _IDX_LABELS)):
        if int.from_bytes(content[:4], "big") != magic:
            raise ValueError(f"an idx file begins with {magic}, not with {content[:4]!r}")
    height, width = (int.from_bytes(images[at : at + 4], "big") for at in (8, 12))
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, height, width)
    numbers = np.frombuffer(labels, np.uint8, offset=8).tolist()
    if len(numbers) != len(pixels):
        raise ValueError(f"there are {len(pixels)} images and {len(numbers)} labels")
    return torch.from_numpy(pixels.copy()), [str(number) for number in numbers]


def _folders(first: str) -> Callable[[tuple[Path, ...]], Pictures]:
    """A reader of a tar file of class folders, of those below ``first`` alone."""

    def read(paths: tuple[Path, ...]) -> Pictures:
        files: dict[str, bytes] = {}
        with tarfile.open(paths[0]) as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(first):
                    content = archive.extractfile(member)
                    assert content is not None  # of a file it never is
                    files[member.name] = content.read()
        return _decoded(files.items(), "RGB", position=-2)

    return read


def _alphabets(paths: tuple[Path, ...]) -> Pictures:
    """Omniglot by alphabet: ALL/ALPHABET/CHARACTER/DRAWING.png, in several archives."""
    files: dict[str, bytes] = {}
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    files[name.partition("/")[2]] = archive.read(name)
    return _decoded(files.items(), "L", position=0)


def _decoded(files: Iterable[tuple[str, bytes]], mode: str, position: int) -> Pictures:
    """Pictures by name; the part of the name at ``position`` is the class."""
    pixels, classes = [], []
    for name, content in sorted(files):
        with Image.open(io.BytesIO(content)) as image:
            pixels.append(np.asarray(image.convert(mode)))
        classes.append(name.split("/")[position])
    if not pixels:
        raise ValueError("there is no picture in it")
    stacked = torch.from_numpy(np.stack(pixels))
    channels_first = stacked.permute(0, 3, 1, 2) if mode == "RGB" else stacked.unsqueeze(1)
    return channels_first.contiguous(), classes


def _idx_pair(prefix: str) -> tuple[str, ...]:
    return f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"


ARCHIVES: dict[str, Archive] = {
    "cifar10-test": Archive(
        "the 10,000 test photographs of CIFAR-10 as JPEG, 32x32 colour (no formal licence)",
        ("cifar10_jpeg_60000.tar.xz",),
        True,
        _folders("test/"),
    ),
    "eurosat": Archive(
        "5,000 Sentinel-2 images of land use, 64x64 colour, 10 classes (EuroSAT, MIT)",
        ("eurosat_rgb64_500perclass.tar.xz",),
        True,
        _folders(""),
    ),
    "omniglot": Archive(
        "handwritten characters of 8 alphabets, 105x105 black on white (Omniglot, MIT)",
        ("omniglot_images_background_small1.zip", "omniglot_images_background_small2.zip"),
        False,
        _alphabets,
    ),
    "mnist-test": Archive(
        "the 10,000 test digits of MNIST, 28x28 grey (CC BY-SA 3.0)",
        _idx_pair("mnist_t10k"),
        False,
        _idx,
    ),
    "notmnist": Archive(
        "10,000 letters A to J in many fonts, 28x28 grey (notMNIST)",
        _idx_pair("notmnist_t10k"),
        False,
        _idx,
    ),
    "fashion-test": Archive(
        "the 10,000 test images of Fashion-MNIST, 28x28 grey (MIT)",
        _idx_pair("fashion-mnist/t10k"),
        True,
        _idx,
    ),
}

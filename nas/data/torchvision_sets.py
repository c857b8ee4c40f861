"""Public data sets by name, fetched and read by torchvision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.data.files import MAX_DEFAULT_SIZE
from nas.data.task import RawSet, SplitName
from nas.errors import DataError


@dataclass(frozen=True)
class Public:
    """One row of the table of public sets."""

    description: str
    expects: str  # what must lie where, below the root, for a user who fetches it by hand
    flip: bool
    read: Callable[[Public, Path, bool], RawSet]  # (row, root, download)


def read_public(name: str, root: Path, download: bool) -> RawSet:
    """The set ``name`` of PUBLIC, below ``root``, fetched with torchvision's progress bar.

    Raises DataError, with the files expected and the place for them, where the set is neither
    there nor to be had.
    """
    row = PUBLIC[name]
    try:
        return row.read(row, root, download)
    except Exception as error:  # torchvision's readers raise nearly anything on a broken file
        reason = str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
        raise DataError(
            f"data set '{name}' cannot be read ({reason}): it needs {row.expects} in '{root}'"
        ) from error


def _pair(
    row: Public, train: Any, test: Any, labels: str, classes: Sequence[str], *, lying: bool = False
) -> RawSet:
    """A set of two torchvision data sets with pixels in ``.data``; ``labels`` is their field.

    ``lying``: the files hold the images mirrored at the diagonal.
    """
    pixels = torch.cat([_channels_first(part.data) for part in (train, test)])
    targets = [torch.as_tensor(np.asarray(getattr(part, labels))) for part in (train, test)]
    return RawSet(
        images=pixels.transpose(2, 3).contiguous() if lying else pixels,
        labels=torch.cat(targets).long(),
        classes=tuple(classes),
        description=row.description,
        flip=row.flip,
        given=_consecutive({"train": len(targets[0]), "test": len(targets[1])}),
    )


def _channels_first(data: Tensor | np.ndarray) -> Tensor:
    """uint8 [N, C, H, W] of [N, H, W], [N, H, W, 3] or [N, 3, H, W]."""
    pixels = torch.as_tensor(data)
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    return pixels if pixels.shape[1] == 3 else pixels.permute(0, 3, 1, 2)


def _consecutive(lengths: dict[SplitName, int]) -> dict[SplitName, Tensor]:
    """Image numbers of splits that lie one behind the other."""
    parts = torch.arange(sum(lengths.values())).split(list(lengths.values()))
    return dict(zip(lengths, parts, strict=True))


def _files(
    row: Public, splits: dict[SplitName, list[tuple[Any, int]]], classes: Sequence[str]
) -> RawSet:
    """A set of (path, label) lists, large enough to stay in its files."""
    samples = [sample for part in splits.values() for sample in part]
    return RawSet(
        images=tuple(Path(path) for path, _ in samples),
        labels=torch.tensor([label for _, label in samples]),
        classes=tuple(classes),
        description=row.description,
        flip=row.flip,
        given=_consecutive({name: len(part) for name, part in splits.items()}),
        image_size=MAX_DEFAULT_SIZE,
        stream=True,
    )


def _by_train_flag(class_name: str) -> Callable[[Public, Path, bool], RawSet]:
    """A reader for the classes of torchvision that take ``train=True`` or ``False``."""

    def read(row: Public, root: Path, download: bool) -> RawSet:
        from torchvision import datasets  # seconds to import, so only where it is needed

        constructor = getattr(datasets, class_name)
        train = constructor(root, train=True, download=download)
        test = constructor(root, train=False, download=download)
        return _pair(row, train, test, "targets", train.classes)

    return read


def _emnist(row: Public, root: Path, download: bool) -> RawSet:
    from torchvision.datasets import EMNIST

    train = EMNIST(root, split="balanced", train=True, download=download)
    test = EMNIST(root, split="balanced", train=False, download=download)
    return _pair(row, train, test, "targets", train.classes, lying=True)


def _svhn(row: Public, root: Path, download: bool) -> RawSet:
    from torchvision.datasets import SVHN

    train = SVHN(root / "svhn", split="train", download=download)
    test = SVHN(root / "svhn", split="test", download=download)
    return _pair(row, train, test, "labels", [str(digit) for digit in range(10)])


def _stl10(row: Public, root: Path, download: bool) -> RawSet:
    from torchvision.datasets import STL10

    train = STL10(root, split="train", download=download)
    test = STL10(root, split="test", download=download)
    return _pair(row, train, test, "labels", train.classes)


def _flowers102(row: Public, root: Path, download: bool) -> RawSet:
    from torchvision.datasets import Flowers102

    splits: dict[SplitName, list[tuple[Any, int]]] = {}
    for name in ("train", "val", "test"):
        part = Flowers102(root, split=name, download=download)
        splits[name] = list(zip(part._image_files, part._labels, strict=True))
    return _files(row, splits, part.classes)


def _imagenet(row: Public, root: Path, download: bool) -> RawSet:
    from torchvision.datasets import ImageNet

    train = ImageNet(root / "imagenet", split="train")
    val = ImageNet(root / "imagenet", split="val")  # the official test labels are not public
    names = [", ".join(words) for words in train.classes]
    twice = {name for name, count in Counter(names).items() if count > 1}  # "crane" is two classes
    classes = [
        f"{name} ({wnid})" if name in twice else name
        for name, wnid in zip(names, train.wnids, strict=True)
    ]
    return _files(row, {"train": train.samples, "test": val.samples}, classes)


def _idx(folder: str) -> str:
    return f"{folder}/raw/ with the unpacked idx files train-images-idx3-ubyte, " \
        "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"  # fmt: skip


PUBLIC: dict[str, Public] = {
    "cifar10": Public(
        "60,000 photographs, 32x32 colour, 10 classes (Krizhevsky 2009, no formal licence)",
        "cifar-10-batches-py/ (from cifar-10-python.tar.gz)",
        True,
        _by_train_flag("CIFAR10"),
    ),
    "cifar100": Public(
        "60,000 photographs, 32x32 colour, 100 classes (Krizhevsky 2009, no formal licence)",
        "cifar-100-python/ (from cifar-100-python.tar.gz)",
        True,
        _by_train_flag("CIFAR100"),
    ),
    "svhn": Public(
        "99,289 house numbers, 32x32 colour, 10 classes (Netzer 2011, non-commercial use)",
        "svhn/train_32x32.mat and svhn/test_32x32.mat",
        False,
        _svhn,
    ),
    "fashion-mnist": Public(
        "70,000 articles of clothing, 28x28 grey, 10 classes (Xiao 2017, MIT)",
        _idx("FashionMNIST"),
        True,
        _by_train_flag("FashionMNIST"),
    ),
    "mnist": Public(
        "70,000 handwritten digits, 28x28 grey, 10 classes (LeCun 1998, CC BY-SA 3.0)",
        _idx("MNIST"),
        False,
        _by_train_flag("MNIST"),
    ),
    "kmnist": Public(
        "70,000 cursive Japanese characters, 28x28 grey, 10 classes (Clanuwat 2018, CC BY-SA 4.0)",
        _idx("KMNIST"),
        False,
        _by_train_flag("KMNIST"),
    ),
    "emnist": Public(
        "131,600 handwritten digits and letters, 28x28 grey, 47 classes, the balanced split "
        "(Cohen 2017, public domain)",
        "EMNIST/raw/ with the unpacked emnist-balanced-{train,test}-{images-idx3,labels-idx1}"
        "-ubyte (from gzip.zip)",
        False,
        _emnist,
    ),
    "flowers102": Public(
        "8,189 photographs of flowers, 102 classes (Nilsback 2008, no formal licence)",
        "flowers-102/ with jpg/ (from 102flowers.tgz), imagelabels.mat and setid.mat",
        True,
        _flowers102,
    ),
    "stl10": Public(
        "13,000 labelled photographs, 96x96 colour, 10 classes (Coates 2011, from ImageNet)",
        "stl10_binary/ (from stl10_binary.tar.gz)",
        True,
        _stl10,
    ),
    "imagenet": Public(
        "1.33 million photographs, 1,000 classes (ILSVRC 2012, non-commercial research)",
        "imagenet/ with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz, which only image-net.org hands out, to registered users,",
        True,
        _imagenet,
    ),
}

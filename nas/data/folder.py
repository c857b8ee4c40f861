"""A folder of images: one folder a class, below train/, val/ and test/ if the user has cut them."""

from __future__ import annotations

from pathlib import Path

import torch

from nas.data.task import RawSet, SplitName
from nas.errors import DataError

IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")


def read_folder(path: Path) -> RawSet:
    """The set in ``path``: class names are folder names, sorted; files directly inside them.

    Hidden files and files that are no images are passed over and counted in the description.
    Raises DataError for a folder that is missing, empty, of one class, with an empty class, or
    with splits that differ in their classes.
    """
    if not path.is_dir():
        raise DataError(f"the folder '{path}' does not exist: give one that holds a folder a class")
    found = [folder.name for folder in _folders(path)]
    if set(found) & set(SPLIT_NAMES):
        return _read_split_folder(path, found)
    files, ignored = _read_classes(path)
    return _raw_set(path, {"": files}, list(files), ignored)


def _read_split_folder(path: Path, found: list[str]) -> RawSet:
    strangers = set(found) - set(SPLIT_NAMES)
    if "train" not in found or strangers:
        listed = ", ".join(found)
        raise DataError(
            f"the folder '{path}' holds {listed}: beside train there may be val and test, no other"
        )
    files: dict[str, dict[str, list[Path]]] = {}
    ignored = 0
    for split in SPLIT_NAMES:
        if split in found:
            files[split], passed_over = _read_classes(path / split)
            ignored += passed_over
    classes = list(files["train"])
    for name, held in files.items():
        if differing := set(held) ^ set(classes):
            raise DataError(
                f"'{path / name}' and '{path / 'train'}' differ in the classes "
                f"{', '.join(sorted(differing))}: every split needs the same class folders"
            )
    return _raw_set(path, files, classes, ignored)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_classes(path: Path) -> tuple[dict[str, list[Path]], int]:
    """The image files of each class folder of ``path``, and how many other files there are."""
    files: dict[str, list[Path]] = {}
    ignored = 0
    for folder in _folders(path):
        entries = sorted(p for p in folder.iterdir() if p.is_file())
        images = [p for p in entries if _is_image(p)]
        if not images:
            raise DataError(f"the class folder '{folder}' holds no images: fill it or remove it")
        files[folder.name] = images
        ignored += len(entries) - len(images)
    if len(files) < 2:
        raise DataError(
            f"the folder '{path}' holds {len(files)} class folder(s) with images: "
            "a classification task needs at least two, one folder a class"
        )
    return files, ignored


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _raw_set(
    path: Path, files: dict[str, dict[str, list[Path]]], classes: list[str], ignored: int
) -> RawSet:
    """The set of ``files[split][class]``; the split "" means that the user has cut none."""
    paths: list[Path] = []
    labels: list[int] = []
    given: dict[SplitName, torch.Tensor] = {}
    for split, held in files.items():
        start = len(paths)
        for label, name in enumerate(classes):
            paths += held[name]
            labels += [label] * len(held[name])
        if split:
            given[split] = torch.arange(start, len(paths))  # type: ignore[index]
    passed_over = f"; {ignored} other files passed over" if ignored else ""
    return RawSet(
        images=tuple(paths),
        labels=torch.tensor(labels),
        classes=tuple(classes),
        description=f"{len(paths):,} images in {len(classes)} classes from the folder "
        f"{path.name}, licence as its owner says{passed_over}",
        flip=None,
        given=given,
    )

"""Every data set by its name: embedded, public, or a folder of the user's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nas.data.embedded import EMBEDDED
from nas.data.files import FileImages, Progress, open_files
from nas.data.folder import read_folder
from nas.data.scaling import scale_to_cover
from nas.data.splits import (
    TEST_FRACTION,
    balanced_subset,
    duplicate_groups,
    limit_splits,
    make_splits,
    shared_between,
)
from nas.data.task import (
    ImageStore,
    ImageTask,
    RawSet,
    SplitName,
    TensorImages,
    channel_statistics,
    task_digest,
)
from nas.data.torchvision_sets import PUBLIC, read_public
from nas.errors import ConfigurationError, DataError, UnknownNameError
from nas.observer import Observer
from nas.randomness import generator

FOLDER_PREFIX = "folder:"
DATA_SETS: dict[str, str] = {
    **{name: row.description for name, row in EMBEDDED.items()},
    **{name: row.description for name, row in PUBLIC.items()},
    f"{FOLDER_PREFIX}PATH": "images of your own: one folder a class, below train/, val/ and test/ "
    "if you have cut them",
}
MIN_SIZE, MAX_SIZE = 4, 1024  # pixels a side
EXAMPLES = 4  # images kept as they came, to show what a deployed model will be given
EXAMPLE_BYTES = 1_500_000  # of all of them: MLflow writes them as text, nine times as long
STATISTICS_IMAGES = 2000  # sample for mean and std of a set that stays in files


def load_task(
    name: str,
    *,
    root: Path,
    image_size: int | None = None,
    largest: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float = TEST_FRACTION,
    limit: int | None = None,
    seed: int = 0,
    download: bool = True,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> ImageTask:
    """The data set ``name``, one of DATA_SETS, cut into train, validation and test.

    Args:
        root: where public sets lie or are downloaded to; embedded sets and folders ignore it.
        image_size: pixels a side of the square that every image is scaled to cover and cropped
            to, 4 to 1024. By default embedded and small public sets keep their own size,
            flowers102 and imagenet take 224, and a folder keeps a common size of up to 64 pixels
            or else takes the median shortest side (a multiple of 8, at most 224).
        largest: where no ``image_size`` is asked for, scale images down to at most this side.
        val_fraction: share of the training images for validation, in (0, 1); by default 0.2, or
            0.1 where the test split is given. Not used where validation is given too.
        test_fraction: share of all images for the test split, in (0, 1), where none is given.
            A public set's official test split is always ours (imagenet: its validation split).
        limit: keep at most so many images, chosen evenly from the classes, for quick runs. Each
            split shrinks in proportion: what is test in the whole set is never trained on.
        seed: decides ``limit`` and the splits.
        progress: called with (what, done, total) while files are read.
        observer: warned if given splits share identical images.

    ``flip`` is stated for each named set; a folder's is true if its images have colour, as grey
    ones are so often digits, letters or scans that have a handedness.

    Raises UnknownNameError, ConfigurationError for impossible fractions or limits, and DataError
    for data that is missing, broken or too small.
    """
    _check_numbers(image_size, largest, limit)  # before anything is downloaded
    return task_of(
        name,
        read_raw(name, root, download),
        image_size=image_size,
        largest=largest,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        limit=limit,
        seed=seed,
        progress=progress,
        observer=observer,
    )


def task_of(
    name: str,
    raw: RawSet,
    *,
    image_size: int | None = None,
    largest: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float = TEST_FRACTION,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> ImageTask:
    """The task ``name`` of a set that was read already; see :func:`load_task`."""
    if limit is not None and "test" in raw.given:
        raw, limit = _limited(raw, limit, seed), None
    images = _store(raw, image_size, largest, progress)
    labels, classes = raw.labels, raw.classes
    # by the images as they came, so that the splits do not depend on the size they are scaled to
    groups = duplicate_groups(images.origins())
    splits = make_splits(
        labels,
        groups,
        classes=classes,
        given=raw.given,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    if observer is not None and (shared := shared_between(groups, splits)):
        observer.on_warning(
            "shared_images", f"{shared} images of '{name}' also occur in an earlier split"
        )
    if limit is not None and limit < len(labels):
        kept, splits = limit_splits(splits, labels, limit, len(classes), seed)
        images, labels = images.subset(kept), labels[kept]
    mean, std = channel_statistics(images, _statistics_sample(images, splits.train))
    flip = images.shape[0] == 3 if raw.flip is None else raw.flip
    return ImageTask(
        name=name,
        description=raw.description,
        images=images,
        labels=labels,
        classes=classes,
        splits=splits,
        mean=mean,
        std=std,
        flip=flip,
        examples=_examples(images, splits.val),
        digest=task_digest(images, labels, classes, splits, flip),
    )


def _check_numbers(image_size: int | None, largest: int | None, limit: int | None) -> None:
    for name, size in (("image_size", image_size), ("largest", largest)):
        if size is not None and not MIN_SIZE <= size <= MAX_SIZE:
            raise DataError(
                f"{name} is {size}: it must lie between {MIN_SIZE} and {MAX_SIZE} pixels"
            )
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit is {limit}: it must be a positive number of images")


def read_raw(name: str, root: Path, download: bool = True) -> RawSet:
    """The set ``name``, one of DATA_SETS, as its reader finds it."""
    if name.startswith(FOLDER_PREFIX):
        return read_folder(Path(name.removeprefix(FOLDER_PREFIX)).expanduser())
    if name in EMBEDDED:
        row = EMBEDDED[name]
        return row.read(row.description)
    if name in PUBLIC:
        return read_public(name, root, download)
    raise UnknownNameError("data set", name, DATA_SETS)


def _limited(raw: RawSet, limit: int, seed: int) -> RawSet:
    """``limit`` images at most, the official splits shrunk alike, classes kept even.

    Before anything is read: of a set such as ImageNet only the chosen files are opened.
    """
    total = sum(len(numbers) for numbers in raw.given.values())
    if limit >= total:
        return raw
    kept: list[Tensor] = []
    given: dict[SplitName, Tensor] = {}
    start = 0
    for split, numbers in raw.given.items():
        quota = limit * len(numbers) // total
        rng = generator(seed, "limit", split)
        chosen = numbers[balanced_subset(raw.labels[numbers], quota, rng)]
        kept.append(chosen)
        given[split] = torch.arange(start, start + len(chosen))
        start += len(chosen)
    numbers = torch.cat(kept)
    images = (
        raw.images[numbers]
        if isinstance(raw.images, Tensor)
        else tuple(raw.images[number] for number in numbers.tolist())
    )
    return replace(raw, images=images, labels=raw.labels[numbers], given=given)


def _store(
    raw: RawSet, image_size: int | None, largest: int | None, progress: Progress | None
) -> ImageStore:
    size = image_size or raw.image_size
    if image_size is None and size is not None and largest is not None:
        size = min(size, largest)
    if not isinstance(raw.images, Tensor):
        return open_files(
            raw.images, image_size=size, largest=largest, stream=raw.stream, progress=progress
        )
    side = min(raw.images.shape[2:])
    if size is None and largest is not None and side > largest:
        size = largest
    if size is None:
        return TensorImages(raw.images)
    return TensorImages(resized(raw.images, size), TensorImages(raw.images))


def resized(pixels: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] scaled, antialiased, to cover a square of ``size``; centre cropped."""
    if pixels.shape[2:] == (size, size):
        return pixels
    chunks = [scale_to_cover(chunk.float(), size, size) for chunk in pixels.split(1024)]
    return torch.cat([chunk.to(torch.uint8) for chunk in chunks])


def _examples(images: ImageStore, val: Tensor) -> Tensor:
    """The first images of the validation split that share the size of the very first.

    An image that alone has more than EXAMPLE_BYTES is shrunk to so many, in its own proportions.
    """
    first, *others = images.originals(val[:EXAMPLES])
    alike = torch.stack([first, *(image for image in others if image.shape == first.shape)])
    if first.numel() <= EXAMPLE_BYTES:
        return alike[: EXAMPLE_BYTES // first.numel()]
    shrink = math.sqrt(EXAMPLE_BYTES / first.numel())
    height, width = (max(1, int(side * shrink)) for side in first.shape[1:])
    return scale_to_cover(alike[:1].float(), height, width).to(torch.uint8)


def _statistics_sample(images: ImageStore, train: Tensor) -> Tensor:
    if not isinstance(images, FileImages) or len(train) <= STATISTICS_IMAGES:
        return train
    chosen = torch.randperm(len(train), generator=generator(0, "statistics"))[:STATISTICS_IMAGES]
    return train[chosen.sort().values]

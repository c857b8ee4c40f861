"""Loading by name: sizes, limits, statistics, digests and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas.data import DATA_SETS, ImageTask, load_task
from nas.data.catalog import resized
from nas.data.task import MIN_STD, TensorImages, channel_statistics, task_digest
from nas.errors import ConfigurationError, DataError, UnknownNameError
from nas.randomness import generator

NOWHERE = Path("no-such-folder")


def test_loading_twice_gives_the_same_task(digits: ImageTask) -> None:
    again = load_task("digits", root=NOWHERE)
    assert again.digest == digits.digest
    assert torch.equal(again.splits.test, digits.splits.test)
    assert load_task("digits", root=NOWHERE, seed=1).digest != digits.digest


def test_the_digest_sees_pixels_labels_classes_and_splits(digits: ImageTask) -> None:
    pixels = digits.images.gather(torch.arange(1797))
    arguments = [TensorImages(pixels), digits.labels, digits.classes, digits.splits, False]
    assert task_digest(*arguments) == digits.digest  # type: ignore[arg-type]
    one_pixel, one_label = pixels.clone(), digits.labels.clone()
    one_pixel[5, 0, 3, 3] += 1
    one_label[5] = (one_label[5] + 1) % 10
    moved = replace(digits.splits, val=digits.splits.val[1:])
    for place, changed in enumerate(
        [TensorImages(one_pixel), one_label, ("zero", *digits.classes[1:]), moved, True]
    ):
        altered = [*arguments[:place], changed, *arguments[place + 1 :]]
        assert task_digest(*altered) != digits.digest  # type: ignore[arg-type]


def test_statistics_equal_numpy_over_the_training_split_only(digits: ImageTask) -> None:
    train = digits.images.gather(digits.splits.train).numpy() / 255
    assert digits.mean == pytest.approx((train.mean(),), rel=1e-12)
    assert digits.std == pytest.approx((train.std(),), rel=1e-12)


def test_statistics_of_three_channels_and_of_a_constant_one() -> None:
    rng = generator(0, "pixels")
    pixels = torch.randint(0, 256, (300, 3, 5, 4), generator=rng, dtype=torch.uint8)
    pixels[:, 2] = 51
    mean, std = channel_statistics(TensorImages(pixels), torch.arange(300))
    scaled = pixels.numpy() / 255
    assert mean == pytest.approx(scaled.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std[:2] == pytest.approx(scaled.std(axis=(0, 2, 3))[:2], rel=1e-12)
    assert (mean[2], std[2]) == (pytest.approx(0.2), MIN_STD)


def test_a_limit_keeps_an_even_deterministic_subset(animals: ImageTask) -> None:
    small = load_task("animals", root=NOWHERE, limit=205)
    assert len(small.labels) == 205
    for split in (small.splits.train, small.splits.val, small.splits.test):
        counts = small.labels[split].bincount()
        assert int(counts.max()) - int(counts.min()) <= 1
    assert small.digest == load_task("animals", root=NOWHERE, limit=205).digest
    assert small.digest != load_task("animals", root=NOWHERE, limit=205, seed=3).digest
    assert load_task("animals", root=NOWHERE, limit=10_000).digest == animals.digest


def test_image_size_scales_like_pillow(digits: ImageTask) -> None:
    task = load_task("digits", root=NOWHERE, image_size=20, limit=60)
    assert task.images.shape == (1, 20, 20)
    pixels = digits.images.gather(torch.arange(50))
    ours = resized(pixels, 5).int().numpy()[:, 0]
    for image, small in zip(pixels[:, 0].numpy(), ours, strict=True):
        reference = Image.fromarray(image).resize((5, 5), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(reference, dtype=int) - small).max() <= 1


def test_resizing_a_rectangle_crops_its_centre() -> None:
    pixels = torch.zeros(1, 1, 10, 30, dtype=torch.uint8)
    pixels[..., 10:20] = 200  # the middle third
    assert torch.equal(resized(pixels, 10), torch.full((1, 1, 10, 10), 200, dtype=torch.uint8))


def test_every_name_has_a_description_and_unknown_ones_a_suggestion() -> None:
    assert {"digits", "mnist5k", "animals", "cifar10", "imagenet", "folder:PATH"} <= set(DATA_SETS)
    assert all(len(text) > 20 for text in DATA_SETS.values())
    with pytest.raises(UnknownNameError, match="unknown data set 'cifar': did you mean 'cifar"):
        load_task("cifar", root=NOWHERE)


@pytest.mark.parametrize("size", [-1, 0, 3, 1025])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"image_size is {size}: .* between 4 and 1024"):
        load_task("digits", root=NOWHERE, image_size=size)


def test_a_limit_must_leave_every_class_in_every_split() -> None:
    with pytest.raises(ConfigurationError, match="limit is 0"):
        load_task("digits", root=NOWHERE, limit=0)
    with pytest.raises(DataError, match="at least 30 are needed"):
        load_task("digits", root=NOWHERE, limit=20)
    assert len(load_task("digits", root=NOWHERE, limit=30).splits.val) == 10


def test_the_splits_do_not_depend_on_the_size() -> None:
    own = load_task("animals", root=NOWHERE, limit=600)
    small = load_task("animals", root=NOWHERE, limit=600, largest=14)
    assert small.shape.height == 14
    assert load_task("animals", root=NOWHERE, limit=600, largest=64).shape.height == 28
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(own.splits, split), getattr(small.splits, split))


def test_the_images_as_they_came_are_kept(animals: ImageTask) -> None:
    small = load_task("animals", root=NOWHERE, limit=600, largest=14)
    own = load_task("animals", root=NOWHERE, limit=600)
    chosen = small.splits.test[[5, 0]]
    assert torch.equal(torch.stack(small.images.originals(chosen)), own.images.gather(chosen))
    # they are shown to a deployed model
    assert torch.equal(small.examples, own.images.gather(own.splits.val[: len(own.examples)]))
    assert len(small.examples) == 4


def test_a_limit_never_trains_on_what_is_test_in_the_whole_set(animals: ImageTask) -> None:
    def pixels(task: ImageTask, *splits: str) -> set[bytes]:
        numbers = torch.cat([getattr(task.splits, split) for split in splits])
        return {image.numpy().tobytes() for image in task.images.gather(numbers)}

    small = load_task("animals", root=NOWHERE, limit=2000)
    held = pixels(animals, "test")
    assert pixels(small, "test") <= held
    assert not pixels(small, "train", "val") & held

"""Batch augmentation against a loop over images, Pillow-style arithmetic and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nas.data.augment import (
    Augmentation,
    crop_boxes,
    cut_out,
    jitter,
    resized_crop,
    shift_and_flip,
)
from nas.errors import ConfigurationError
from nas.randomness import generator


def _images(count: int, height: int, width: int, channels: int) -> torch.Tensor:
    rng = generator(0, "images")
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_shift_and_flip_equals_a_loop(channels: int, padding: int) -> None:
    images = _images(40, 7, 9, channels)
    rng = generator(1, "draws")
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, 40), generator=rng)
    flips = torch.randint(0, 2, (40,), generator=rng).bool()
    ours = shift_and_flip(images, tops, lefts, flips, padding).numpy()
    for number, image in enumerate(images.numpy()):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        top, left = int(tops[number]), int(lefts[number])
        expected = padded[top : top + 7, left : left + 9]
        if flips[number]:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(ours[number], expected)


@pytest.mark.parametrize("side", [1, 2, 5, 6, 40])
def test_cut_out_equals_a_loop(side: int) -> None:
    images = _images(60, 7, 9, 3).float() + 1
    rng = generator(1, "draws")
    rows = torch.randint(0, 7, (60,), generator=rng)
    columns = torch.randint(0, 9, (60,), generator=rng)
    ours = cut_out(images, rows, columns, side)
    expected = images.clone()
    for image, row, column in zip(expected, rows.tolist(), columns.tolist(), strict=True):
        top, left = row - side // 2, column - side // 2
        image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_equals_torchvision_image_by_image(channels: int) -> None:
    from torchvision.transforms.v2 import functional as reference

    images = _images(12, 6, 5, channels).float() / 255
    factors = 0.5 + torch.rand(3, 12, generator=generator(2, "factors"))
    ours = jitter(images, *factors)
    for number in range(12):
        expected = images[number].permute(2, 0, 1)
        brightness, contrast, saturation = factors[:, number].tolist()
        expected = reference.adjust_brightness(expected, brightness)
        expected = reference.adjust_contrast(expected, contrast)
        expected = reference.adjust_saturation(expected, saturation)
        torch.testing.assert_close(ours[number].permute(2, 0, 1), expected, atol=2e-4, rtol=0)


def test_boxes_are_legal_and_cover_their_range() -> None:
    boxes = crop_boxes(4000, 70, 80, generator(0, "boxes"))
    top, left, height, width = boxes.unbind(1)
    assert int(torch.minimum(top, left).min()) >= 0
    assert int((top + height).max()) <= 70
    assert int((left + width).max()) <= 80
    area = (height * width).double() / (70 * 80)
    aspect = width.double() / height
    assert 0.07 < float(area.min()) < 0.1
    assert 0.9 < float(area.max()) <= 1.0
    assert 0.7 < float(aspect.min()) < 0.8
    assert 1.3 < float(aspect.max()) < 1.4


def test_boxes_of_a_strip_fall_back_to_its_centre() -> None:
    boxes = crop_boxes(5, 10, 1000, generator(0, "boxes"))
    assert boxes.tolist() == [[0, 494, 10, 13]] * 5


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    images = _images(3, 8, 6, 3).float()
    whole = torch.tensor([[0, 0, 8, 6]] * 3)
    torch.testing.assert_close(resized_crop(images, whole), images, atol=1e-3, rtol=0)


def test_resized_crop_of_a_slope_is_the_slope_of_the_box() -> None:
    slope = torch.arange(16.0)[:, None] * 10 + torch.arange(16.0)  # linear, so bilinear is exact
    boxes = torch.tensor([[4, 2, 8, 4], [3, 7, 4, 8]])
    ours = resized_crop(slope[None, :, :, None].expand(2, -1, -1, -1), boxes)
    centre = (torch.arange(16) + 0.5) / 16
    for result, (top, left, height, width) in zip(ours, boxes.tolist(), strict=True):
        rows, columns = top + centre * height - 0.5, left + centre * width - 0.5
        expected = rows[:, None] * 10 + columns
        torch.testing.assert_close(result[..., 0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"crop_padding": -1}, {"cutout": -2}, {"color_jitter": 1.5}])
def test_impossible_augmentations_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="must be at least 0"):
        Augmentation(**options)  # type: ignore[arg-type]

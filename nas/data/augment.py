"""Augmentation of whole batches, without a loop over images.

Shapes: B images of H x W pixels and C channels, laid out [B, H, W, C] so that a permuted view is
channels-last. Random numbers are drawn on the CPU and moved, so that every device augments alike.
Nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import ConfigurationError
from nas.hardware import to_device


@dataclass(frozen=True)
class Augmentation:
    """What training does to its images, in this order. The default does nothing.

    The published CIFAR recipe (DARTS, appendix A) is ``Augmentation(crop_padding=4, flip=True,
    cutout=16)`` at 32 pixels; the ImageNet one ``Augmentation(random_resized_crop=True,
    flip=True, color_jitter=0.4)``.
    """

    random_resized_crop: bool = False  # 8-100 % of the area, aspect 3:4 to 4:3, scaled back
    crop_padding: int = 0  # pixels of black on each side, then a random crop of the old size
    flip: bool = False  # mirror left and right with probability 1/2
    color_jitter: float = 0.0  # brightness, contrast, saturation by factors in [1 - j, 1 + j]
    cutout: int = 0  # side of a square of zeros after normalisation, in pixels

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or self.cutout < 0 or not 0 <= self.color_jitter <= 1:
            raise ConfigurationError(
                f"crop_padding {self.crop_padding} and cutout {self.cutout} must be at least 0 "
                f"pixels, and color_jitter {self.color_jitter} between 0 and 1"
            )


def draw_integers(count: int, high: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """int64 [count], uniform in 0 .. high - 1."""
    return to_device(torch.randint(high, (count,), generator=rng), device)


def shift_and_flip(
    images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, padding: int
) -> Tensor:
    """Crop each image of a batch that is thought padded with zeros, then mirror where asked.

    Args:
        images: [B, H, W, C], any type.
        tops, lefts: int64 [B], corner of the crop in the padded image, 0 .. 2 * padding.
        flips: bool [B].
        padding: pixels on each side.
    """
    count, height, width = images.shape[:3]
    device = images.device
    rows = tops[:, None] + (torch.arange(height, device=device) - padding)  # [B, H]
    columns = lefts[:, None] + (torch.arange(width, device=device) - padding)  # [B, W]
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    batch = torch.arange(count, device=device)[:, None, None]
    picked = images[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    if padding == 0:
        return picked
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]  # [B, H, W]
    return picked * inside.unsqueeze(-1)


def cut_out(images: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Zero a square of ``side`` pixels around each centre, clipped at the border (DARTS, cutout).

    ``images`` [B, H, W, C]; ``rows``, ``columns`` int64 [B] are the centres; an even square
    reaches from centre - side / 2 to centre + side / 2 - 1.
    """
    height, width = images.shape[1:3]
    device = images.device
    from_top = torch.arange(height, device=device) - (rows[:, None] - side // 2)  # [B, H]
    from_left = torch.arange(width, device=device) - (columns[:, None] - side // 2)  # [B, W]
    in_rows = (from_top >= 0) & (from_top < side)
    in_columns = (from_left >= 0) & (from_left < side)
    hole = in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(hole.unsqueeze(-1), 0.0)


_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, in that order, by a factor an image.

    ``images`` float [B, H, W, C] in 0..1, C 1 or 3; the factors float [B]. Hue, which the
    ImageNet recipe of some papers turns as well, stays.
    """

    luma = to_device(torch.tensor(_LUMA, dtype=images.dtype), images.device)

    def grey(x: Tensor) -> Tensor:
        if x.shape[3] == 1:
            return x
        return (x * luma).sum(dim=3, keepdim=True)

    def blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
        weight = factor[:, None, None, None]
        return (x * weight + other * (1 - weight)).clamp(0, 1)

    images = blend(images, 0.0, brightness)
    images = blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), contrast)
    return blend(images, grey(images), saturation)


_AREA = (0.08, 1.0)  # of the image
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))  # width to height
_TRIES = 10


def crop_boxes(count: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """Random boxes of 8 to 100 % of the area and aspect 3:4 to 4:3, int64 [count, 4].

    Each row is (top, left, height, width) in pixels, inside the image. Of ten candidates the
    first that fits is taken; where none does, the largest central box of a legal aspect.
    """
    random = torch.rand(count, _TRIES, 2, generator=rng, dtype=torch.float64)
    area = height * width * (_AREA[0] + random[..., 0] * (_AREA[1] - _AREA[0]))
    aspect = (_LOG_ASPECT[0] + random[..., 1] * (_LOG_ASPECT[1] - _LOG_ASPECT[0])).exp()
    widths = (area * aspect).sqrt().round().long()  # [count, tries]
    heights = (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    fallback_width = min(width, max(1, round(height * 4 / 3)))
    fallback_height = min(height, max(1, round(width * 4 / 3)))
    found = fits.any(dim=1)
    box_width = torch.where(found, widths.gather(1, first).squeeze(1), fallback_width)
    box_height = torch.where(found, heights.gather(1, first).squeeze(1), fallback_height)
    place = torch.rand(count, 2, generator=rng, dtype=torch.float64)
    place[~found] = 0.5
    top = (place[:, 0] * (height - box_height + 1)).long()
    left = (place[:, 1] * (width - box_width + 1)).long()
    return torch.stack([top, left, box_height, box_width], dim=1)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each box of ``boxes`` [B, 4] stretched, bilinearly, to the whole image.

    ``images`` float [B, H, W, C]; boxes as from :func:`crop_boxes`.
    """
    height, width = images.shape[1:3]
    top, left, box_height, box_width = boxes.to(images).unbind(1)
    zero = torch.zeros_like(top)
    # affine_grid maps output coordinates in -1..1 to input coordinates in -1..1
    theta = torch.stack(
        [
            torch.stack([box_width / width, zero, (2 * left + box_width) / width - 1], dim=1),
            torch.stack([zero, box_height / height, (2 * top + box_height) / height - 1], dim=1),
        ],
        dim=1,
    )  # [B, 2, 3]
    channels_first = images.permute(0, 3, 1, 2)
    grid = F.affine_grid(theta, list(channels_first.shape), align_corners=False)
    sampled = F.grid_sample(channels_first, grid, padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1).contiguous()

"""Scaling against Pillow's, at awkward sizes, and as an exported program."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from nas.data.scaling import scale_to_cover
from nas.randomness import generator

SIZES = [(375, 500), (200, 133), (31, 47), (33, 32), (10, 10), (1, 9), (9, 1), (1, 1), (2, 300)]


def draw_pixels(rows: int, columns: int, count: int = 1) -> Tensor:
    """Blobs of a few pixels with sharp noise on them, uint8 [count, 3, rows, columns]."""
    rng = generator(rows, "scaling", columns)
    blobs = torch.randint(0, 200, (count, 3, rows // 5 + 1, columns // 5 + 1), generator=rng)
    coarse = blobs.repeat_interleave(5, 2).repeat_interleave(5, 3)[:, :, :rows, :columns]
    noise = torch.randint(0, 56, coarse.shape, generator=rng)
    return (coarse + noise).to(torch.uint8)


@pytest.mark.parametrize("wanted", [(32, 32), (9, 8), (40, 64)])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_pillows_fit_but_for_pillows_second_rounding(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    height, width = wanted
    pixels = draw_pixels(*size)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)
    ours = scale_to_cover(pixels.float(), height, width)
    assert torch.equal(ours, ours.round())
    errors = np.abs(ours[0].permute(1, 2, 0).numpy() - np.asarray(fitted, dtype=float))
    assert errors.max() <= 1
    assert errors.mean() < 0.35


@pytest.mark.parametrize("size", [(32, 32), (7, 8), (1, 5), (224, 224)])
def test_the_wanted_size_is_left_as_it_is(size: tuple[int, int]) -> None:
    pixels = draw_pixels(*size, count=2).float()
    assert torch.equal(scale_to_cover(pixels, *size), pixels)


def test_a_crop_without_scaling_takes_the_middle() -> None:
    pixels = draw_pixels(8, 14).float()
    assert torch.equal(scale_to_cover(pixels, 8, 8), pixels[..., 3:11])


class _Scaled(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return scale_to_cover(pixels, 9, 8)


def test_one_exported_program_takes_every_size() -> None:
    automatic = torch.export.Dim.AUTO
    program = torch.export.export(
        _Scaled(),
        (torch.zeros(2, 3, 10, 13),),
        dynamic_shapes=[{0: automatic, 2: automatic, 3: automatic}],
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count, size in enumerate([*SIZES, (9, 8), (8, 9)], 1):
        pixels = draw_pixels(*size, count=count).float()
        assert torch.equal(loaded(pixels), scale_to_cover(pixels, 9, 8)), size

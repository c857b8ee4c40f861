"""How images are brought to the size of a network: here once, and inside every deployed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_to_cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """Float pixels 0..255 [N, C, H, W] scaled, antialiased, to cover a box; centre cropped to it.

    The result [N, C, height, width] has whole numbers, as if it had been stored as an image.
    Images of that very size stay as they are, bit for bit. The filter and its place are those of
    Pillow's ``ImageOps.fit`` with ``BILINEAR``, whose crop may cut through a pixel; Pillow rounds
    once more, between rows and columns, and so differs by at most one level.

    H and W may be symbols of ``torch.export``: nothing here branches on them.
    """
    rows, columns = pixels.shape[2:]
    step = torch.sym_min(rows / height, columns / width)  # pixels here for one of the result
    narrowed = pixels @ _weights(columns, width, step, pixels).T  # [N, C, H, width]
    scaled = _weights(rows, height, step, pixels) @ narrowed
    return scaled.round().clamp(0, 255)


def _weights(size: int, wanted: int, step: Any, like: Tensor) -> Tensor:
    """What each of ``size`` pixels in a row gives to each of ``wanted``: [wanted, size].

    A triangle around the place of the wanted pixel, which reaches one ``step`` (a float, or a
    symbol for one) to either side, and at least one pixel.
    """
    places = torch.arange(size, dtype=torch.float64, device=like.device) + 0.5
    from_centre = torch.arange(wanted, dtype=torch.float64, device=like.device) - (wanted - 1) / 2
    centres = from_centre * step + size / 2
    distances = (places - centres[:, None]).abs()
    weights = (1 - distances / torch.sym_max(step, 1.0)).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)

"""How images are brought to the size of a network: here once, and inside every deployed model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scale_to_cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """Float pixels 0..255 [N, C, H, W] scaled, antialiased, to cover a box; centre cropped to it.

    The result has whole numbers, as if it had been stored as an image.
    """
    rows, columns = pixels.shape[2:]
    scale = max(height / rows, width / columns)
    covering = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    scaled = F.interpolate(pixels, covering, mode="bilinear", antialias=True)
    return scaled[:, :, top : top + height, left : left + width].round().clamp(0, 255)

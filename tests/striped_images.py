"""Image files of mixed sizes and formats whose classes are easy to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("check", "lying", "standing")
EACH = 40


def write_stripes(folder: Path) -> Path:
    """``folder/<class>/<number>``: checks and stripes that lie or stand, 10 to 119 pixels a side.

    Every other file is a JPEG, the others are PNG.
    """
    rng = np.random.default_rng(0)
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
        for number in range(EACH):
            image = Image.fromarray(_draw(label, rng))
            image.save(folder / label / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


def _draw(label: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3]: about three waves along the shorter side, and noise."""
    height, width = rng.integers(10, 120, 2)
    pace = 18 / min(height, width)
    rows = np.sin(np.arange(height) * pace + rng.uniform(0, 6))[:, None]
    columns = np.sin(np.arange(width) * pace + rng.uniform(0, 6))[None]
    waves = {"check": rows * columns, "lying": rows, "standing": columns}[label]
    pixels = 128 + 60 * waves[..., None] + rng.normal(0, 20, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)

"""Randomness without global state.

Every random draw comes from a generator named by what it is for, so that a draw depends on
(seed, purpose, epoch, batch) and on nothing that ran before. A run that is killed and resumed
therefore repeats itself without any generator state in its checkpoint.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, e.g. ``derive_seed(0, "order", epoch)``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(
    seed: int, *purpose: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on ``device``, seeded by :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))

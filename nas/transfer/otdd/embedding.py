"""Images as vectors: the feature space that a distance between data sets is measured in.

Distances can be compared only within one embedding, so every embedding has a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.data.scaling import scale_to_cover
from nas.errors import ConfigurationError

SIDE = 8  # pixels; with three colours 192 dimensions, in which covariances stay affordable
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2


@dataclass(frozen=True)
class Embedding:
    """A function from images to vectors, and a name by content.

    Attributes:
        name: for people.
        digest: equal for embeddings that give equal vectors; whoever wraps a function of his own
            answers for that.
        function: uint8 [n, C, H, W] of any size, C 1 or 3, to float [n, d] on the CPU. Each image
            must be embedded independently of the others.
    """

    name: str
    digest: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """The vectors [n, d] of ``images``, uint8 [n, C, H, W]."""
        return self.function(images)


def pixels(side: int = SIDE, channels: int = 3) -> Embedding:
    """Raw pixels in 0..1 at ``side`` x ``side``: ``channels * side**2`` dimensions.

    Every set is brought to the same form by :func:`to_common`. It needs no data, no weights and
    no network, so it is the same everywhere: what a supernet's sketch is made with by default.
    """

    def embed(images: Tensor) -> Tensor:
        return to_common(images, side, channels).flatten(1)

    return Embedding(
        f"pixels at {side}x{side}x{channels}", digest_of("pixels", side, channels), embed
    )


def to_common(images: Tensor, side: int, channels: int) -> Tensor:
    """float32 [n, channels, side, side] in 0..1 of uint8 ``images`` [n, C, H, W].

    Images are scaled, antialiased, to cover the square, and cropped to its centre; small ones are
    enlarged bilinearly. Grey images become colour by repeating their channel, colour ones grey by
    ITU-R 601-2.

    Raises:
        ConfigurationError: channels other than 1 and 3 would have to be made up.
    """
    own = images.shape[1]
    if own != channels and {own, channels} != {1, 3}:
        raise ConfigurationError(
            f"images of {own} channel(s) cannot be turned into {channels}: only grey (1) and "
            "colour (3) can be turned into one another"
        )
    scaled = scale_to_cover(images.float(), side, side) / 255
    if own < channels:
        return scaled.expand(-1, channels, -1, -1)
    if own > channels:
        return (scaled * scaled.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return scaled


def digest_of(kind: str, *parts: object) -> str:
    """A digest over a kind and its parts; tensors count with every bit, the rest as text."""
    state = hashlib.sha256(kind.encode())
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"/{part.dtype}{tuple(part.shape)}/".encode())
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            state.update(raw.numpy().tobytes())
        else:
            state.update(f"/{part!r}/".encode())
    return state.hexdigest()

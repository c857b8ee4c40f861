"""Images as vectors: the feature space that a distance between data sets is measured in.

Distances can be compared only within one embedding, so every embedding has a digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.data import ImageTask
from nas.data.scaling import scale_to_cover
from nas.data.splits import balanced_subset
from nas.errors import ConfigurationError
from nas.randomness import generator

SHAPE_WEIGHT = 2.0  # 1 to 4 rank alike
FAINT = 0.05  # contrast below which an image is mostly noise
SIDE = 8  # pixels; with three colours 192 dimensions, in which covariances stay affordable
COMPONENTS, PCA_SIDE = 64, 16  # of the pixels of 16 x 16 colour images
PCA_IMAGES = 2000  # of each data set
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
    no network, so it is the same everywhere.
    """

    def embed(images: Tensor) -> Tensor:
        return to_common(images, side, channels).flatten(1)

    return Embedding(
        f"pixels at {side}x{side}x{channels}", digest_of("pixels", side, channels), embed
    )


def shapes(side: int = SIDE, channels: int = 3) -> Embedding:
    """What an image shows apart from how bright and how strong: ``channels * side**2 + 2`` numbers.

    Pixels as in :func:`pixels`, less their mean m and over their standard deviation s (and FAINT),
    as a vector of length SHAPE_WEIGHT at most; then m and s. By raw pixels dark sets are near dark
    sets and faint ones near faint ones, whatever they show.
    """

    def embed(images: Tensor) -> Tensor:
        raw = to_common(images, side, channels).flatten(1)
        mean = raw.mean(1, keepdim=True)
        contrast = raw.std(1, correction=0, keepdim=True)
        shape = (raw - mean) / (contrast + FAINT) / math.sqrt(raw.shape[1])
        return torch.cat([SHAPE_WEIGHT * shape, mean, contrast], 1)

    digest = digest_of("shapes", side, channels, SHAPE_WEIGHT, FAINT)
    return Embedding(f"shapes at {side}x{side}x{channels}", digest, embed)


def principal_components(
    tasks: Sequence[ImageTask],
    *,
    components: int = COMPONENTS,
    side: int = PCA_SIDE,
    channels: int = 3,
) -> Embedding:
    """The first principal components of raw pixels, fitted to as many images of each of ``tasks``.

    Pixels as in :func:`pixels`; neither scaled nor whitened, so distances keep their units and are
    never larger than those of the pixels. Distances of these sets only: another collection has
    other components, and another digest. Test splits are not looked at.

    Raises:
        ConfigurationError: no task, or not at least one component.
    """
    if not tasks or components < 1:
        raise ConfigurationError(
            f"principal components need a data set and at least 1 component, not {len(tasks)} "
            f"and {components}"
        )
    raw = pixels(side, channels)
    tasks = sorted(tasks, key=lambda task: task.digest)
    sample = torch.cat([_sample(task, raw) for task in tasks]).double()
    mean = sample.mean(0)
    centred = sample - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors  # the largest last
    basis = axes.flip(1)[:, :components]  # [pixels, components]

    def embed(images: Tensor) -> Tensor:
        return ((raw(images) - mean) @ basis).float()

    digests = [task.digest for task in tasks]
    return Embedding(
        f"{basis.shape[1]} principal components of {raw.name}",
        digest_of("pca", components, side, channels, *digests),
        embed,
    )


def _sample(task: ImageTask, raw: Embedding) -> Tensor:
    """Pixels of at most PCA_IMAGES images of ``task``, evenly from its classes."""
    pool = torch.cat([task.splits.train, task.splits.val]).sort().values
    rng = generator(0, "otdd", "components")
    chosen = pool[balanced_subset(task.labels[pool], PCA_IMAGES, rng)]
    return torch.cat([raw(task.images.gather(chunk)) for chunk in chosen.split(256)])


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

"""The `cell` transfer: searched cells in a skeleton that suits the target (NASTransfer)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from nas.architecture import Architecture, Skeleton
from nas.errors import ArchitectureError, ConfigurationError
from nas.evaluation import count_macs
from nas.spaces import find_space

if TYPE_CHECKING:
    from nas.data.task import TaskShape

IMAGENET_SIDE = 128  # pixels; from here on the stem that divides the resolution by 8
MAX_CHANNELS = 4096  # far above any published network, so that the choice always ends


def restack(
    architecture: Architecture,
    shape: TaskShape,
    *,
    channels: int | None = None,
    cells: int | None = None,
    max_macs: int | None = None,
    stem: str | None = None,
) -> Architecture:
    """The same cells in a new skeleton (papers' mobile setting: at most 600 M multiply-adds).

    Args:
        architecture: what a search found; its own channels and cells are the defaults.
        shape: of the target's images.
        channels: initial channels, used as they are.
        cells: number of cells, used as it is.
        max_macs: limit in multiply-adds of one target image (the convention of
            :func:`nas.evaluation.count_macs`); the initial channels become the largest even
            number, up to 4096, that keeps it.
        stem: "cifar" or "imagenet"; by default "imagenet" for images whose shorter side is at
            least 128 pixels.

    Raises:
        ConfigurationError: both ``channels`` and ``max_macs`` are given.
        ArchitectureError: even two channels exceed ``max_macs``, or the space cannot build the
            skeleton.
    """
    if channels is not None and max_macs is not None:
        raise ConfigurationError(
            f"give the channels ({channels}) or the limit in multiply-adds ({max_macs}), not both"
        )
    large = min(shape.height, shape.width) >= IMAGENET_SIDE
    skeleton = Skeleton(
        stem=stem or ("imagenet" if large else "cifar"),
        channels=architecture.skeleton.channels if channels is None else channels,
        cells=architecture.skeleton.cells if cells is None else cells,
    )
    if max_macs is not None:
        skeleton = _widest(architecture, skeleton, shape, max_macs)
    # The space checks the skeleton once more: it may be choosier than Skeleton itself.
    space = find_space(architecture.space)
    return space.architecture(dict(architecture.decisions), skeleton)


def _widest(
    architecture: Architecture, skeleton: Skeleton, shape: TaskShape, max_macs: int
) -> Skeleton:
    space = find_space(architecture.space)

    def macs(pairs: int) -> int:
        candidate = architecture.with_skeleton(replace(skeleton, channels=2 * pairs))
        return count_macs(space.meta_network(candidate, shape, auxiliary=False), shape)

    # Bisection in pairs of channels: `fits` keeps the limit, `exceeds` does not. The work grows
    # almost with the square of the channels, which guesses better than the middle does.
    fits, exceeds = 0, MAX_CHANNELS // 2 + 1
    guess = skeleton.channels // 2
    while exceeds - fits > 1:
        guess = min(max(guess, fits + 1), exceeds - 1)
        cost = macs(guess)
        if cost <= max_macs:
            fits = guess
        else:
            exceeds = guess
        guess = int(guess * (max_macs / cost) ** 0.5)
    if fits == 0:
        raise ArchitectureError(
            f"{skeleton.cells} cells of 2 channels take {macs(1)} multiply-adds at "
            f"{shape.height}x{shape.width}, above the limit of {max_macs}; use fewer cells or a "
            "higher limit"
        )
    return replace(skeleton, channels=2 * fits)


def parse_macs(text: str) -> int:
    """Multiply-adds as people write them: "600M", "1.5G", "250k" or a plain whole number.

    Raises:
        ConfigurationError: ``text`` is no positive number of that form.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKmMgG]?)", text.strip())
    macs = round(float(match[1]) * units[match[2].lower()]) if match else 0
    if macs < 1:
        raise ConfigurationError(
            f"{text!r} is no number of multiply-adds; write for example 600M, 1.5G or 250k"
        )
    return macs

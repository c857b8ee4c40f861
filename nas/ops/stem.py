"""The supernet's stem in eager PyTorch: a 3x3 convolution and a batch normalisation.

:func:`nas.ops.native.stem` is its twin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.ops.mixed import Normaliser, Statistics
from nas.ops.packing import Packing


def stem_weights(inputs: int, outputs: int) -> Packing:
    """Layout of the weights for ``inputs`` channels: ``filters`` [ky, kx, in, out]."""
    return Packing({"filters": (3, 3, inputs, outputs), "scale": (outputs,), "shift": (outputs,)})


def stem(images: Tensor, weights: Tensor, statistics: Statistics, stored: torch.dtype) -> Tensor:
    """What the first cell is given.

    Args:
        images: [N, C, H, W], of the weights' type.
        weights: flat, laid out by :func:`stem_weights`.
        statistics: the running statistics of each output channel.
        stored: the type of the result, that of the weights or half as wide.

    Returns:
        [N, out, H, W], channels last.
    """
    table = stem_weights(images.shape[1], statistics.mean.numel()).unpack(weights)
    x = F.conv2d(
        images.contiguous(memory_format=torch.channels_last),
        table["filters"].permute(3, 2, 0, 1),
        padding=1,
    )
    norm = Normaliser.of(statistics, Packing({"stem": statistics.mean.shape}))
    return norm(x, "stem", weight=table["scale"], bias=table["shift"]).to(stored)

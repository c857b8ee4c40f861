"""Building blocks of final networks, as in the evaluation networks of DARTS.

All map [B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]. None changes its input, since
several edges of a cell read the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, batch norm: brings a cell's input to the cell's channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )


class FactorizedReduce(nn.Module):
    """Halves the resolution without losing pixels: two 1x1 convolutions of stride 2, concatenated.

    The second reads the input shifted by one pixel. Where a side is odd, the shifted input gets
    one row or column of zeros, so that both halves have ceil(H / 2) rows.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.conv1 = nn.Conv2d(channels_in, half, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(channels_in, channels_out - half, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(images)
        height, width = images.shape[2:]
        shifted = images[:, :, 1:, 1:]
        if height % 2 or width % 2:
            shifted = F.pad(shifted, (0, width % 2, 0, height % 2))
        return self.norm(torch.cat([self.conv1(images), self.conv2(shifted)], dim=1))


class DilConv(nn.Sequential):
    """ReLU, dilated depthwise and pointwise convolution, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(*_separable(channels, kernel, stride, dilation=2))


class SepConv(nn.Sequential):
    """ReLU, depthwise and pointwise convolution, batch norm, all twice; the stride comes first."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(
            *_separable(channels, kernel, stride, dilation=1),
            *_separable(channels, kernel, 1, dilation=1),
        )


def _separable(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(
        channels,
        channels,
        kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=channels,
        bias=False,
    )
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return [nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels)]


def _skip(channels: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)


PRIMITIVES: dict[str, Callable[[int, int], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda channels, stride: nn.AvgPool2d(
        3, stride, padding=1, count_include_pad=False
    ),
    "skip_connect": _skip,
    "sep_conv_3x3": lambda channels, stride: SepConv(channels, 3, stride),
    "sep_conv_5x5": lambda channels, stride: SepConv(channels, 5, stride),
    "dil_conv_3x3": lambda channels, stride: DilConv(channels, 3, stride),
    "dil_conv_5x5": lambda channels, stride: DilConv(channels, 5, stride),
}
"""Makes the module of an operation from (channels, stride); `none` has no module."""


def initialise(module: AnyModule, generator: torch.Generator) -> AnyModule:
    """Give a module that was built on the meta device its memory and its first weights.

    The memory is on the generator's device. The distributions are torch's defaults: convolution
    and linear weights and biases uniform within 1 / sqrt(fan in), batch norms one and zero. They
    are drawn from ``generator`` in module order, and global random state is neither read nor
    changed.

    Raises:
        TypeError: ``module`` holds parameters or buffers of another kind of layer.
    """
    module.to_empty(device=generator.device)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                bound = part.weight[0].numel() ** -0.5
                for weight in part.parameters(recurse=False):
                    weight.uniform_(-bound, bound, generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_parameters()
            elif [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                raise TypeError(f"no initial weights are known for {type(part).__name__}")
    return module

"""The supernet's stem and cells in C++ (csrc/): one call for all cells and direction.

:func:`mixed_cells` has the signature and the numbers of its eager twin in :mod:`nas.ops.mixed`. It
keeps states, statistics, convolutions and outputs of the cells for the backward pass, computes the
rest again and pays for no gradient that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nas.errors import NativeError
from nas.ops.mixed import EDGES, NODES, REDUCING, CellPlan, Statistics
from nas.ops.stem import stem as eager_stem

MOMENTUM = 0.1  # of the running statistics, torch's default
FEW = 16  # mixed channels, with which fewer convolutions are kept
LINE = 64  # numbers; each part of what a cell keeps begins on such a boundary (csrc/chain.h)


def mixed_cells(
    plans: Sequence[CellPlan],
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """A chain of cells of the supernet; see :func:`nas.ops.mixed.mixed_cells`."""
    operator = torch.ops.nas_transfer.mixed_cells
    return call_operator(
        operator, plans, before_previous, previous, weights, statistics, operations, edges, active
    )


def call_operator(
    operator: Callable[..., tuple[Tensor, ...]],
    plans: Sequence[CellPlan],
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """:func:`mixed_cells` by any operator with its schema."""
    channels_last = torch.channels_last
    device = weights.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):  # the parameters stay as they are
        narrow = torch.get_autocast_dtype(device)
        before_previous, previous = before_previous.to(narrow), previous.to(narrow)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad
        for x in (before_previous, previous, weights, operations, edges)
    )
    output, mean, _, variance, _ = operator(
        before_previous.contiguous(memory_format=channels_last),
        previous.contiguous(memory_format=channels_last),
        weights,
        statistics.mean,
        statistics.variance,
        operations if edges is None else operations * edges.unsqueeze(-1),
        operations.new_ones(operations.shape[:-1]) if edges is None else edges,
        active,
        [plan.channels for plan in plans],
        [plan.reduction for plan in plans],
        plans[0].partial,
        plans[0].previous_reduction,
        statistics.training,
        keep,
    )
    _update(statistics, mean, variance)
    return output


def _update(statistics: Statistics, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of a batch, as PyTorch does."""
    if statistics.training and statistics.update:
        # .data, since stem and cells share one vector of statistics: the backward pass of either,
        # which does not read it, checks that nobody has written to it since
        statistics.mean.data.lerp_(mean, MOMENTUM)
        statistics.variance.data.lerp_(variance, MOMENTUM)


def stem(images: Tensor, weights: Tensor, statistics: Statistics, stored: torch.dtype) -> Tensor:
    """What the first cell is given; see :func:`nas.ops.stem.stem`.

    Images that need a gradient, or are stored in another type, are PyTorch's own business.
    """
    return call_stem(torch.ops.nas_transfer.stem, images, weights, statistics, stored)


def call_stem(
    operator: Callable[..., tuple[Tensor, ...]],
    images: Tensor,
    weights: Tensor,
    statistics: Statistics,
    stored: torch.dtype,
) -> Tensor:
    """:func:`stem` by any operator with its schema."""
    half = stored == torch.bfloat16
    if images.requires_grad or (stored != weights.dtype and not half):
        return eager_stem(images, weights, statistics, stored)
    output, mean, _, variance, _ = operator(
        images.contiguous(memory_format=torch.channels_last),
        weights,
        statistics.mean,
        statistics.variance,
        half,
        statistics.training,
    )
    _update(statistics, mean, variance)
    return output


@cache
def register() -> None:
    """Tell PyTorch the shapes and the gradients of the operators, once the library is loaded."""
    for name, shapes, backward, context in (
        ("mixed_cells", _shapes, _backward, _setup_context),
        ("mixed_cells_backward", _gradient_shapes, _refuse, None),
        ("stem", _stem_shapes, _stem_backward, _stem_context),
        ("stem_backward", _stem_gradient_shapes, _refuse, None),
    ):
        operator = f"nas_transfer::{name}"
        torch.library.register_fake(operator, shapes)
        torch.library.register_autograd(operator, backward, setup_context=context)


def _shapes(
    before: Tensor,
    previous: Tensor,
    weights: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    operations: Tensor,
    bypass: Tensor,
    active: Tensor | None,
    channels: Sequence[int],
    reduction: Sequence[bool],
    partial: int,
    previous_reduction: bool,
    training: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    images, _, height, width = previous.shape
    lanes = 1 if previous.device.type == "cuda" else 16
    kept = 0
    for cell, halve in zip(channels, reduction, strict=True):
        states = 2 * images * height * width * cell
        height, width = ((size + 1) // 2 if halve else size for size in (height, width))
        output = images * height * width * NODES * cell
        parts = [states, _convolutions(images, height * width, cell // partial, halve, lanes)]
        kept += sum(_whole_lines(part) for part in (*parts, output))
    kept -= _whole_lines(output)  # the last one is the result
    result = previous.new_empty(images, NODES * channels[-1], height, width)
    return (
        result.to(memory_format=torch.channels_last),
        *(torch.empty_like(running_mean) for _ in range(3)),
        previous.new_empty(kept if keep else 0),
    )


def _whole_lines(numbers: int) -> int:
    return -(-numbers // LINE) * LINE


def _convolutions(images: int, pixels: int, channels: int, reduction: bool, lanes: int) -> int:
    """Numbers of the convolutions that a cell keeps (csrc/cpu/edge.h, Kept).

    ``lanes`` channels of an image lie together, or with fewer channels, those of several images
    (csrc/cpu/layout.h, Layout); a GPU has no such lanes, 1. Up to 16 channels the first ones of the
    separable convolutions are kept alone, with more on a processor everything, on a GPU all but the
    second ones of these (csrc/cuda/geometry.h).
    """
    each = 2 if channels <= FEW else 4 if lanes == 1 else 6
    convolutions = each * len(EDGES) + (len(REDUCING) if reduction else 0)
    if channels >= lanes:
        return convolutions * images * pixels * lanes * -(-channels // lanes)
    together = lanes // (1 << (channels - 1).bit_length())
    return convolutions * pixels * lanes * -(-images // together)


def _gradient_shapes(
    gradient: Tensor,
    before: Tensor,
    previous: Tensor,
    weights: Tensor,
    operations: Tensor,
    bypass: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    need_before, need_previous, need_weights, need_mixing = rest[-4:]
    needed = (need_before, need_previous, need_weights, need_mixing, need_mixing)
    inputs = (before, previous, weights, operations, bypass)
    return tuple(
        torch.empty_like(x) if need else x.new_empty(0)
        for x, need in zip(inputs, needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    before, previous, weights, _, _, operations, bypass, active, *sizes, _ = inputs
    result, mean, deviation, variance, kept = output
    ctx.mark_non_differentiable(mean, deviation, variance, kept)
    ctx.set_materialize_grads(False)  # or it would fill as many zeros as were kept
    ctx.save_for_backward(
        before, previous, weights, operations, bypass, active, result, mean, deviation, kept
    )
    ctx.sizes = sizes


def _backward(
    ctx: Any,
    gradient: Tensor | None,
    *unused: Tensor | None,
    operator: Callable[..., tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor | None, ...]:
    operator = operator or torch.ops.nas_transfer.mixed_cells_backward
    if gradient is None:  # nothing that is differentiated looks at the output
        return (None,) * 14
    need_before, need_previous, need_weights, _, _, need_operations, need_bypass = (
        ctx.needs_input_grad[:7]
    )
    gradients = operator(
        gradient.contiguous(memory_format=torch.channels_last),
        *ctx.saved_tensors,
        *ctx.sizes,
        need_before,
        need_previous,
        need_weights,
        need_operations or need_bypass,
    )
    needed = (need_before, need_previous, need_weights, need_operations, need_bypass)
    before, previous, weights, operations, bypass = (
        value if need else None for value, need in zip(gradients, needed, strict=True)
    )
    return before, previous, weights, None, None, operations, bypass, *(None,) * 7


def _stem_shapes(
    images: Tensor,
    weights: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    half: bool,
    training: bool,
) -> tuple[Tensor, ...]:
    n, _, height, width = images.shape
    convolution = images.new_empty(n, running_mean.numel(), height, width)
    convolution = convolution.to(memory_format=torch.channels_last)
    output = torch.empty_like(convolution, dtype=torch.bfloat16 if half else None)
    return output, *(torch.empty_like(running_mean) for _ in range(3)), convolution


def _stem_gradient_shapes(gradient: Tensor, images: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weights)


def _stem_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, weights, *_, training = inputs
    _, mean, deviation, variance, convolution = output
    ctx.mark_non_differentiable(mean, deviation, variance, convolution)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images, weights, mean, deviation, convolution)
    ctx.training = training


def _stem_backward(
    ctx: Any,
    gradient: Tensor | None,
    *unused: Tensor | None,
    operator: Callable[..., Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    operator = operator or torch.ops.nas_transfer.stem_backward
    if gradient is None or not ctx.needs_input_grad[1]:
        return (None,) * 6
    weights = operator(
        gradient.contiguous(memory_format=torch.channels_last), *ctx.saved_tensors, ctx.training
    )
    return None, weights, *(None,) * 4


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    # without this, PyTorch would take the first derivatives for constants, and only warn
    raise NativeError(
        "native kernels have first derivatives only: a supernet of backend 'eager' has the second"
    )

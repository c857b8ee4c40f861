"""The supernet's cell in C++ (csrc/): one call a cell and direction.

:func:`mixed_cell` has the signature and the numbers of its eager twin in :mod:`nas.ops.mixed`. It
keeps states, statistics and convolutions of a cell for the backward pass, computes the rest again
and pays for no gradient that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nas.errors import NativeError
from nas.ops.mixed import EDGES, NODES, REDUCING, CellPlan, Statistics

MOMENTUM = 0.1  # of the running statistics, torch's default
SIZES = ("channels", "partial", "reduction", "previous_reduction")


def mixed_cell(
    plan: CellPlan,
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """One cell of the supernet; see :func:`nas.ops.mixed.mixed_cell`."""
    operator = torch.ops.nas_transfer.mixed_cell
    return call_operator(
        operator, plan, before_previous, previous, weights, statistics, operations, edges, active
    )


def call_operator(
    operator: Callable[..., tuple[Tensor, ...]],
    plan: CellPlan,
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """:func:`mixed_cell` by any operator with its schema."""
    channels_last = torch.channels_last
    device = weights.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):  # the parameters stay as they are
        narrow = torch.get_autocast_dtype(device)
        before_previous, previous = before_previous.to(narrow), previous.to(narrow)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad
        for x in (before_previous, previous, weights, operations, edges)
    )
    output, _, mean, _, variance, _ = operator(
        before_previous.contiguous(memory_format=channels_last),
        previous.contiguous(memory_format=channels_last),
        weights,
        statistics.mean,
        statistics.variance,
        operations if edges is None else operations * edges.unsqueeze(1),
        operations.new_ones(len(EDGES)) if edges is None else edges,
        active,
        *(getattr(plan, size) for size in SIZES),
        statistics.training,
        keep,
    )
    if statistics.training and statistics.update:
        # .data, since cells share one vector of statistics and the stem's backward pass, which does
        # not read it, checks that nobody has written to it since
        statistics.mean.data.lerp_(mean, MOMENTUM)
        statistics.variance.data.lerp_(variance, MOMENTUM)
    return output


@cache
def register() -> None:
    """Tell PyTorch the shapes and the gradients of the operators, once the library is loaded."""
    torch.library.register_fake("nas_transfer::mixed_cell", _shapes)
    torch.library.register_fake("nas_transfer::mixed_cell_backward", _gradient_shapes)
    torch.library.register_autograd(
        "nas_transfer::mixed_cell", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("nas_transfer::mixed_cell_backward", _refuse)


def _shapes(
    before: Tensor,
    previous: Tensor,
    weights: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    operations: Tensor,
    bypass: Tensor,
    active: Tensor | None,
    channels: int,
    partial: int,
    reduction: bool,
    previous_reduction: bool,
    training: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    images, _, height, width = previous.shape
    nodes = [(size + 1) // 2 if reduction else size for size in (height, width)]
    output = previous.new_empty(images, NODES * channels, *nodes)
    lanes = 1 if previous.device.type == "cuda" else 16
    pixels = images * nodes[0] * nodes[1]
    kept = _kept_numbers(pixels, images, channels // partial, reduction, lanes)
    return (
        output.to(memory_format=torch.channels_last),
        previous.new_empty(2, images, height, width, channels),
        *(torch.empty_like(running_mean) for _ in range(3)),
        previous.new_empty(kept if keep else 0),
    )


def _kept_numbers(pixels: int, images: int, channels: int, reduction: bool, lanes: int) -> int:
    """Size of what a forward pass keeps (csrc/cpu/edge.h, Kept): planes of all convolutions.

    ``lanes`` channels of an image lie together, or with fewer channels, those of several images
    (csrc/cpu/layout.h, Layout). A GPU has no such lanes, 1, and does not keep the second ones of
    the separable convolutions (csrc/cuda/geometry.h).
    """
    each = 4 if lanes == 1 else 6
    convolutions = each * len(EDGES) + (len(REDUCING) if reduction else 0)
    if channels >= lanes:
        return convolutions * pixels * lanes * -(-channels // lanes)
    together = lanes // (1 << (channels - 1).bit_length())
    return convolutions * pixels // images * lanes * -(-images // together)


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
    nodes, states, mean, deviation, variance, kept = output
    ctx.mark_non_differentiable(states, mean, deviation, variance, kept)
    ctx.set_materialize_grads(False)  # or it would fill as many zeros as were kept
    ctx.save_for_backward(
        before, previous, weights, operations, bypass, active, nodes, states, mean, deviation, kept
    )
    ctx.sizes = sizes


def _backward(
    ctx: Any,
    gradient: Tensor | None,
    *unused: Tensor | None,
    operator: Callable[..., tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor | None, ...]:
    operator = operator or torch.ops.nas_transfer.mixed_cell_backward
    if gradient is None:  # nothing that is differentiated looks at the cell's output
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


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    # without this, PyTorch would take the first derivatives for constants, and only warn
    raise NativeError(
        "native kernels have first derivatives only: a supernet of backend 'eager' has the second"
    )

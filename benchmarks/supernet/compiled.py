"""The eager supernet under ``torch.compile``, channels last: the strongest opponent in PyTorch.

Compiled by regions: what prepares a state, an edge, the joining of a node. Cells of one resolution
share them. The whole network would be one graph of ten thousand operations: at three cells of four
channels it had not compiled after seven minutes of processor time. In one point the opponent is
favoured: it keeps no running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.ops.mixed import (
    AVERAGE_POOL,
    DIL3,
    DIL5,
    DILATED,
    DILATED3,
    DILATED5,
    EDGES,
    FIRST,
    MAX_POOL,
    NODES,
    REDUCING,
    SECOND,
    SEP3,
    SEP3A,
    SEP3B,
    SEP5,
    SEP5A,
    SEP5B,
    SKIP,
    CellPlan,
    depthwise,
    factorized_reduce,
    pointwise,
    shuffle_channels,
)
from nas.spaces.darts.supernet import NORMAL, REDUCE, Mixing, Supernet

VARIANTS = 64  # shapes times what needs a gradient; PyTorch gives up after 8


def _normalise(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def _preprocess(x: Tensor, matrix: Tensor, halve: bool) -> Tensor:
    return _normalise((factorized_reduce if halve else pointwise)(F.relu(x), matrix))


def _prepare(state: Tensor, mixed: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the edges that leave a state share: its ReLU and both pools."""
    x = state[:, :mixed]
    largest = F.max_pool2d(x, 3, stride, 1)
    average = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    return F.relu(x), _normalise(largest), _normalise(average)


def _edge(
    state: Tensor,
    prepared: tuple[Tensor, Tensor, Tensor],
    taps3: Tensor,
    taps5: Tensor,
    matrices: Tensor,
    reduce: Tensor | None,
    shares: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """All operations of one edge, weighted and summed, beside the channels that pass it by."""
    rectified, largest, average = prepared
    mixed, stride = rectified.shape[1], 1 if reduce is None else 2

    def convolve(x: Tensor, taps: Tensor, slot: int, stride: int, dilation: int = 1) -> Tensor:
        return _normalise(pointwise(depthwise(x, taps, stride, dilation), matrices[slot]))

    def separable(taps: Tensor, first: int, second: int) -> Tensor:
        y = F.relu(convolve(rectified, taps[FIRST], first, stride))
        return convolve(y, taps[SECOND], second, 1)

    skip = state[:, :mixed]
    if reduce is not None:
        skip = _normalise(factorized_reduce(rectified, reduce))
    total = (
        shares[MAX_POOL] * largest
        + shares[AVERAGE_POOL] * average
        + shares[SKIP] * skip
        + shares[SEP3] * separable(taps3, SEP3A, SEP3B)
        + shares[SEP5] * separable(taps5, SEP5A, SEP5B)
        + shares[DIL3] * convolve(rectified, taps3[DILATED], DILATED3, stride, 2)
        + shares[DIL5] * convolve(rectified, taps5[DILATED], DILATED5, stride, 2)
    )
    if mixed < state.shape[1]:
        rest = state[:, mixed:]
        rest = F.max_pool2d(rest, 2, 2, ceil_mode=True) if stride == 2 else rest
        total = torch.cat((total, rest), 1)
    return total if weight is None else weight * total


def _node(edges: list[Tensor], groups: int) -> Tensor:
    total = edges[0]
    for edge in edges[1:]:
        total = total + edge
    return total if groups == 1 else shuffle_channels(total, groups)


class CompiledSupernet(Supernet):
    """A supernet whose regions are compiled, for the training mode only."""

    def forward(
        self,
        images: Tensor,
        mixing: Mixing,
        *,
        weights: Tensor | None = None,
        update_statistics: bool = True,
    ) -> Tensor:
        flat = self.weights if weights is None else weights
        packings = [self.stem, *(plan.weights for plan in self.plans), self.classifier]
        pieces = [
            packing.unpack(piece)
            for packing, piece in zip(
                packings, flat.split([packing.size for packing in packings]), strict=True
            )
        ]
        filters = pieces[0]["filters"].permute(3, 2, 0, 1)
        x = F.conv2d(images.contiguous(memory_format=torch.channels_last), filters, padding=1)
        x = F.batch_norm(x, None, None, pieces[0]["scale"], pieces[0]["shift"], training=True)
        before, previous = x, x
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            for plan, cell in zip(self.plans, pieces[1:-1], strict=True):
                kind = REDUCE if plan.reduction else NORMAL
                edges = None if mixing.edges is None else mixing.edges[kind]
                output = self._cell(plan, before, previous, cell, mixing.operations[kind], edges)
                before, previous = previous, output
        return previous.mean((2, 3)) @ pieces[-1]["matrix"] + pieces[-1]["bias"]

    def _cell(
        self,
        plan: CellPlan,
        before: Tensor,
        previous: Tensor,
        cell: Mapping[str, Tensor],
        operations: Tensor,
        edges: Tensor | None,
    ) -> Tensor:
        states = [
            preprocess(before, cell["preprocess0"], plan.previous_reduction),
            preprocess(previous, cell["preprocess1"], False),
        ]
        taps3, taps5 = cell["depthwise3"].unbind(), cell["depthwise5"].unbind()
        matrices, shares = cell["pointwise"].unbind(), operations.unbind()
        reduce = dict(zip(REDUCING, cell["reduce"].unbind(), strict=True)) if plan.reduction else {}
        weights = [None] * len(EDGES) if edges is None else edges.unbind()
        prepared: list[tuple[Tensor, Tensor, Tensor]] = []
        for node in range(2, 2 + NODES):
            for source in range(len(prepared), node):
                stride = 2 if plan.reduction and source < 2 else 1
                prepared.append(prepare(states[source], plan.mixed, stride))
            outputs = [
                edge(
                    states[source],
                    prepared[source],
                    taps3[number],
                    taps5[number],
                    matrices[number],
                    reduce.get(number),
                    shares[number],
                    weights[number],
                )
                for number, (source, target) in enumerate(EDGES)
                if target == node
            ]
            states.append(join(outputs, plan.partial))
        return torch.cat(states[2:], 1)


# A shape is compiled for itself: the sizes of a search never change.
preprocess = torch.compile(_preprocess, dynamic=False)
prepare = torch.compile(_prepare, dynamic=False)
edge = torch.compile(_edge, dynamic=False)
join = torch.compile(_node, dynamic=False)

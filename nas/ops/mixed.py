"""The supernet's cell in eager PyTorch: the reference that every native kernel must equal.

One cell and direction is one call, with the cell's parameters packed the way a kernel reads them:
channels last, vectors over channels. What edges share is computed once: the ReLU and both pools
of a state serve all the edges that leave it (papers: DARTS, arXiv 1806.09055; PC-DARTS,
arXiv 1907.05737).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import ConfigurationError
from nas.ops.packing import Packing

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NODES = 4
# (source state, node) of each edge: states 0 and 1 are the cell's inputs, nodes are 2 to 5.
EDGES = tuple((source, node) for node in range(2, 2 + NODES) for source in range(node))
SOURCES = 2 + NODES - 1  # states that an edge leaves: the two inputs and all nodes but the last
REDUCING = tuple(edge for edge, (source, _) in enumerate(EDGES) if source < 2)

NONE, MAX_POOL, AVERAGE_POOL, SKIP, SEP3, SEP5, DIL3, DIL5 = range(len(OPERATIONS))
# Where each convolution of an edge stands in the packed tables.
SEP3A, SEP3B, SEP5A, SEP5B, DILATED3, DILATED5 = range(6)  # pointwise and its statistics
HALVES = (torch.bfloat16, torch.float16)  # what images may be stored in beside float32 weights
FIRST, SECOND, DILATED = range(3)  # depthwise, in the table of its kernel size


@dataclass(frozen=True)
class CellPlan:
    """The sizes of one supernet cell.

    Attributes:
        before_previous, previous: channels of the two input tensors.
        channels: channels C of each state; the cell returns 4 C.
        partial: K of PC-DARTS; the mixed operation sees C / K channels. 1 is DARTS.
        reduction: edges from the two inputs have stride 2.
        previous_reduction: the tensor before the previous one is twice as large and is halved.
    """

    before_previous: int
    previous: int
    channels: int
    partial: int
    reduction: bool
    previous_reduction: bool

    @property
    def mixed(self) -> int:
        """Channels that the mixed operation sees."""
        return self.channels // self.partial

    @cached_property
    def weights(self) -> Packing:
        """Layout of the cell's weights.

        ``depthwise3/5`` [edge, stage, ky, kx, channel], ``pointwise`` [edge, convolution, in,
        out], ``preprocess*`` [in, out], ``reduce`` [reducing edge, in, out].
        """
        edges, c = len(EDGES), self.mixed
        shapes = {
            "preprocess0": (self.before_previous, self.channels),
            "preprocess1": (self.previous, self.channels),
            "depthwise3": (edges, 3, 3, 3, c),
            "depthwise5": (edges, 3, 5, 5, c),
            "pointwise": (edges, 6, c, c),
        }
        if self.reduction:
            shapes["reduce"] = (len(REDUCING), c, c)
        return Packing(shapes)

    @cached_property
    def statistics(self) -> Packing:
        """Layout of the running means (and, alike, variances) of the cell's normalisations."""
        c = self.mixed
        shapes: dict[str, tuple[int, ...]] = {
            "preprocess": (2, self.channels),
            "pools": (SOURCES, 2, c),  # every edge that leaves a state shares its pools
            "convolutions": (len(EDGES), 6, c),
        }
        if self.reduction:
            shapes["reduce"] = (len(REDUCING), c)
        return Packing(shapes)


@dataclass(frozen=True)
class Statistics:
    """The running statistics of one cell's normalisations, laid out by ``plan.statistics``.

    Attributes:
        mean, variance: flat; changed in place.
        training: normalise by the batch and not by these.
        update: false leaves them alone in training: the unrolled step of second-order DARTS looks
            at weights that the supernet never takes.
    """

    mean: Tensor
    variance: Tensor
    training: bool
    update: bool = True


@dataclass(frozen=True)
class Normaliser:
    """Batch normalisation without scale and shift over unpacked :class:`Statistics`."""

    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    training: bool
    update: bool = True

    @classmethod
    def of(cls, statistics: Statistics, packing: Packing) -> Normaliser:
        """Over ``statistics`` that ``packing`` lays out."""
        return cls(
            packing.unpack(statistics.mean),
            packing.unpack(statistics.variance),
            statistics.training,
            statistics.update,
        )

    def __call__(
        self,
        x: Tensor,
        table: str,
        *index: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        mean, variance = self.mean[table][index], self.variance[table][index]
        if self.training and not self.update:
            return F.batch_norm(x, None, None, weight, bias, training=True)
        return F.batch_norm(x, mean, variance, weight, bias, training=self.training)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution of ``x`` [N, C, H, W] (channels last) by ``weight`` [C, out]."""
    return (x.permute(0, 2, 3, 1) @ weight).permute(0, 3, 1, 2)


def factorized_reduce(x: Tensor, weight: Tensor) -> Tensor:
    """Halve the resolution of ``x`` by two strided 1x1 convolutions, the second shifted by a pixel.

    The first half of the ``out`` columns of ``weight`` [C, out] sees the even pixels, the rest
    the odd ones. Odd sizes are padded by a row and column of zeros for the shifted half.
    """
    half = weight.shape[1] // 2
    shifted = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1::2, 1::2]
    return torch.cat(
        (pointwise(x[:, :, ::2, ::2], weight[:, :half]), pointwise(shifted, weight[:, half:])), 1
    )


def depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """Depthwise convolution by ``weight`` [k, k, C], padded so that stride 1 keeps the size."""
    size, channels = weight.shape[0], weight.shape[-1]
    return F.conv2d(
        x,
        weight.permute(2, 0, 1).unsqueeze(1),
        stride=stride,
        padding=dilation * (size // 2),
        dilation=dilation,
        groups=channels,
    )


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel g * (C / groups) + j moves to j * groups + g (PC-DARTS, section 3.2)."""
    n, c, h, w = x.shape
    return (
        x.view(n, groups, c // groups, h, w)
        .transpose(1, 2)
        .reshape(n, c, h, w)
        .contiguous(memory_format=torch.channels_last)
    )


def rounding(images: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """What rounds to the type that ``images`` are stored in, in tensors of ``weights``'s type.

    Gradients are rounded on their way back.

    Raises:
        ConfigurationError: the images are neither of the weights' type nor half as wide as float32.
    """
    stored, computed = images.dtype, weights.dtype
    if stored == computed:
        return lambda x: x
    if stored not in HALVES or computed != torch.float32:
        raise ConfigurationError(
            f"images are {stored} beside weights that are {computed}: they must be of the same "
            "type, or bfloat16 or float16 beside float32"
        )
    return lambda x: x.to(stored).to(computed)


class _Edges:
    """The candidate operations of one cell for one forward pass."""

    def __init__(
        self,
        plan: CellPlan,
        weights: Mapping[str, Tensor],
        norm: Normaliser,
        store: Callable[[Tensor], Tensor],
    ) -> None:
        self.plan = plan
        self.norm = norm
        self.store = store
        self.depthwise3 = weights["depthwise3"].flatten(0, 1).unbind()
        self.depthwise5 = weights["depthwise5"].flatten(0, 1).unbind()
        self.pointwise = weights["pointwise"].flatten(0, 1).unbind()
        self.reduce = weights["reduce"].unbind() if plan.reduction else ()
        self.shared: dict[tuple[int, int], Tensor] = {}

    def apply(self, operation: int, edge: int, x: Tensor, rectified: Tensor) -> Tensor:
        """Output of ``operation`` on ``edge`` for state ``x`` and its ReLU."""
        source = EDGES[edge][0]
        stride = 2 if self.plan.reduction and source < 2 else 1
        if operation in (MAX_POOL, AVERAGE_POOL):
            return self._pool(operation, source, x, stride)
        if operation == SKIP:
            if stride == 1:
                return x
            slot = REDUCING.index(edge)
            y = factorized_reduce(rectified, self.reduce[slot])
            return self.norm(self.store(y), "reduce", slot)
        if operation in (SEP3, SEP5):
            table, first = (
                (self.depthwise3, SEP3A) if operation == SEP3 else (self.depthwise5, SEP5A)
            )
            y = self._convolve(rectified, table[3 * edge + FIRST], edge, first, stride)
            return self._convolve(F.relu(y), table[3 * edge + SECOND], edge, first + 1, 1)
        table, slot = (
            (self.depthwise3, DILATED3) if operation == DIL3 else (self.depthwise5, DILATED5)
        )
        return self._convolve(rectified, table[3 * edge + DILATED], edge, slot, stride, dilation=2)

    def _convolve(
        self, x: Tensor, taps: Tensor, edge: int, slot: int, stride: int, dilation: int = 1
    ) -> Tensor:
        y = pointwise(depthwise(x, taps, stride, dilation), self.pointwise[6 * edge + slot])
        return self.norm(self.store(y), "convolutions", edge, slot)

    def _pool(self, operation: int, source: int, x: Tensor, stride: int) -> Tensor:
        key = (operation, source)
        if key not in self.shared:
            pooled = (
                F.max_pool2d(x, 3, stride, 1)
                if operation == MAX_POOL
                else F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
            )
            pooled = self.store(pooled)
            self.shared[key] = self.norm(pooled, "pools", source, operation - MAX_POOL)
        return self.shared[key]


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
    """One cell of the supernet.

    Args:
        before_previous, previous: the outputs of the two cells before, [N, C', H', W'], of the
            weights' type; or bfloat16 or float16 beside float32 weights, and then all that a kernel
            sends to memory is rounded to it: states, pools, convolutions before normalisation.
        weights: the cell's weights, flat, laid out by ``plan.weights``.
        statistics: the running statistics of the cell's normalisations.
        operations: mixing weights [14, 8].
        edges: edge weights [14] of PC-DARTS, or None for a plain sum.
        active: booleans [14, 8] on the CPU; what is False is not computed. None computes all.

    Returns:
        The four nodes side by side, [N, 4 C, H, W], channels last, of the images' type.

    Raises:
        ConfigurationError: the images are of another type than these.
    """
    norm = Normaliser.of(statistics, plan.statistics)
    table = plan.weights.unpack(weights)
    halve = factorized_reduce if plan.previous_reduction else pointwise
    store = rounding(previous, weights)
    before, last = (F.relu(x.to(weights.dtype)) for x in (before_previous, previous))
    states = [
        store(norm(store(halve(before, table["preprocess0"])), "preprocess", 0)),
        store(norm(store(pointwise(last, table["preprocess1"])), "preprocess", 1)),
    ]
    candidates = _Edges(plan, table, norm, store)
    mix = operations.unbind()
    edge_weights = None if edges is None else edges.unbind()
    rectified: list[Tensor] = []
    for node in range(2, 2 + NODES):
        for state in states[len(rectified) :]:
            rectified.append(F.relu(state[:, : plan.mixed]))
        incoming = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        total: Tensor | None = None
        bypass: Tensor | None = None
        for edge in incoming:
            source = EDGES[edge][0]
            stride = 2 if plan.reduction and source < 2 else 1
            share = mix[edge] if edge_weights is None else mix[edge] * edge_weights[edge]
            for operation, factor in enumerate(share.unbind()):
                if operation == NONE or (active is not None and not active[edge, operation]):
                    continue
                output = candidates.apply(
                    operation, edge, states[source][:, : plan.mixed], rectified[source]
                )
                total = output * factor if total is None else total + output * factor
            if plan.partial > 1:
                rest = states[source][:, plan.mixed :]
                rest = F.max_pool2d(rest, 2, 2, ceil_mode=True) if stride == 2 else rest
                rest = rest if edge_weights is None else rest * edge_weights[edge]
                bypass = rest if bypass is None else bypass + rest
        states.append(store(_join(plan, states, total, bypass)))
    return torch.cat(states[2:], 1).to(previous.dtype)


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
    """A chain of cells, each on the outputs of the two before it.

    :func:`nas.ops.native.mixed_cells` is its twin. Arguments are those of :func:`mixed_cell`, for
    all cells: ``weights`` and ``statistics`` one after the other, ``operations`` [cells, 14, 8],
    ``edges`` [cells, 14], ``active`` [cells, 14, 8].

    Returns:
        The last cell's output, [N, 4 C, H, W].
    """
    sizes = [plan.statistics.size for plan in plans]
    pieces = zip(
        plans,
        weights.split([plan.weights.size for plan in plans]),
        statistics.mean.split(sizes),
        statistics.variance.split(sizes),
        operations.unbind(),
        [None] * len(plans) if edges is None else edges.unbind(),
        [None] * len(plans) if active is None else active.unbind(),
        strict=True,
    )
    for plan, own, mean, variance, mix, weighting, live in pieces:
        running = Statistics(mean, variance, statistics.training, statistics.update)
        output = mixed_cell(plan, before_previous, previous, own, running, mix, weighting, live)
        before_previous, previous = previous, output
    return previous


def _join(
    plan: CellPlan, states: list[Tensor], total: Tensor | None, bypass: Tensor | None
) -> Tensor:
    """A node from its mixed and its bypassing channels; nothing active on it gives zeros."""
    if total is None:
        n, _, h, w = states[0].shape
        if plan.reduction:
            h, w = (h + 1) // 2, (w + 1) // 2
        total = states[0].new_zeros(n, plan.mixed, h, w)
    if bypass is None:
        return total
    return shuffle_channels(torch.cat((total, bypass), 1), plan.partial)

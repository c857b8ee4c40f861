"""The supernets of DARTS and PC-DARTS as ordinary modules, to hold the packed one against.

Written from the papers (arXiv 1806.09055 and 1907.05737), slowly and plainly: every operation of
every edge is a module with weights and normalisation of its own, and nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.spaces.darts import Genotype
from nas.spaces.darts.supernet import Supernet

NAMES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
FIRST_EDGE = {2: 0, 3: 2, 4: 5, 5: 9}  # of the 2 + 3 + 4 + 5 edges, by node


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x[:, :, :: self.stride, :: self.stride]


class FactorizedReduce(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.even = nn.Conv2d(channels_in, half, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, channels_out - half, 1, stride=2, bias=False)
        self.norm = norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        even = self.even(x)
        shifted = torch.zeros_like(x)
        shifted[:, :, :-1, :-1] = x[:, :, 1:, 1:]
        return self.norm(torch.cat([even, self.odd(shifted)], 1))


class ReLUConvBN(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm = norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(x)))


def convolution(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    return [
        nn.ReLU(),
        nn.Conv2d(
            channels,
            channels,
            kernel,
            stride,
            padding=dilation * (kernel - 1) // 2,
            dilation=dilation,
            groups=channels,
            bias=False,
        ),
        nn.Conv2d(channels, channels, 1, bias=False),
        norm(channels),
    ]


def build(name: str, channels: int, stride: int) -> nn.Module:
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(channels))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm(channels))
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    kernel = 3 if name.endswith("3x3") else 5
    if name.startswith("dil"):
        return nn.Sequential(*convolution(channels, kernel, stride, 2))
    return nn.Sequential(
        *convolution(channels, kernel, stride, 1), *convolution(channels, kernel, 1, 1)
    )


class MixedOp(nn.Module):
    """All operations of an edge, on one K-th of its channels; the rest passes by."""

    def __init__(self, channels: int, stride: int, partial: int) -> None:
        super().__init__()
        self.partial, self.stride = partial, stride
        self.ops = nn.ModuleList(build(name, channels // partial, stride) for name in NAMES)

    def forward(self, x: Tensor, weights: Tensor, only: int | None) -> Tensor:
        seen = x.shape[1] // self.partial
        if only is None:
            mixed = sum(w * op(x[:, :seen]) for w, op in zip(weights, self.ops, strict=True))
        else:
            mixed = self.ops[only](x[:, :seen])
        if self.partial == 1:
            return mixed
        rest = x[:, seen:]
        if self.stride == 2:
            rest = F.max_pool2d(rest, 2, 2, ceil_mode=True)  # the papers' sizes are even
        joined = torch.cat([mixed, rest], 1)
        # Shuffled by hand: output channel j * K + g is channel g * (C / K) + j.
        order = [g * seen + j for j in range(seen) for g in range(self.partial)]
        return joined[:, order]


class Cell(nn.Module):
    def __init__(
        self, before: int, previous: int, channels: int, reduction: bool, halve: bool, partial: int
    ) -> None:
        super().__init__()
        self.reduction = reduction
        make = FactorizedReduce if halve else ReLUConvBN
        self.preprocess0 = make(before, channels)
        self.preprocess1 = ReLUConvBN(previous, channels)
        self.edges = nn.ModuleList(
            MixedOp(channels, 2 if reduction and source < 2 else 1, partial)
            for node in range(2, 6)
            for source in range(node)
        )

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        operations: Tensor,
        edges: Tensor | None,
        genotype: Genotype | None,
    ) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(2, 6):
            total: Tensor | int = 0
            for source in range(node):
                edge = FIRST_EDGE[node] + source
                only = None if genotype is None else self._chosen(genotype, node, source)
                if genotype is not None and only is None:
                    continue
                output = self.edges[edge](states[source], operations[edge], only)
                total = total + (output if edges is None else edges[edge] * output)
            states.append(total)
        return torch.cat(states[2:], 1)

    def _chosen(self, genotype: Genotype, node: int, source: int) -> int | None:
        genes = genotype.reduce if self.reduction else genotype.normal
        for gene in genes[2 * (node - 2) : 2 * (node - 1)]:
            if gene.source == source:
                return NAMES.index(gene.operation)
        return None


class Network(nn.Module):
    """The supernet; architecture weights are arguments, as softmax is no business of its own."""

    def __init__(self, images: int, channels: int, cells: int, classes: int, partial: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(images, 3 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(3 * channels),
        )
        before = previous = 3 * channels
        self.cells = nn.ModuleList()
        halve = False
        for index in range(cells):
            reduction = index in (cells // 3, 2 * cells // 3)
            channels = channels * 2 if reduction else channels
            self.cells.append(Cell(before, previous, channels, reduction, halve, partial))
            before, previous, halve = previous, 4 * channels, reduction
        self.classifier = nn.Linear(previous, classes)

    def forward(
        self,
        images: Tensor,
        operations: Tensor,
        edges: Tensor | None = None,
        genotype: Genotype | None = None,
    ) -> Tensor:
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            kind = int(cell.reduction)
            weights = None if edges is None else edges[kind]
            s0, s1 = s1, cell(s0, s1, operations[kind], weights, genotype)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


def reference_of(supernet: Supernet) -> Network:
    """A reference of the same size with the same weights, in double precision."""
    config, shape = supernet.config, supernet.shape
    network = Network(
        shape.channels, config.channels, config.cells, shape.classes, config.partial
    ).double()
    filled = set()
    with torch.no_grad():
        for parameter, value in parameter_pairs(network, dict(supernet.named_weights())):
            parameter.copy_(value)
            filled.add(parameter)
    assert filled == set(network.parameters())
    return network


def parameter_pairs(
    network: Network, packed: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of ``network`` beside its packed twin (a weight or a gradient) in its layout.

    ``packed`` holds what belongs to a supernet's weights, by the names of those.
    """
    stem, batch_norm = network.stem
    yield stem.weight, packed["stem.filters"].permute(3, 2, 0, 1)
    yield batch_norm.weight, packed["stem.scale"]
    yield batch_norm.bias, packed["stem.shift"]
    yield network.classifier.weight, packed["classifier.matrix"].t()
    yield network.classifier.bias, packed["classifier.bias"]
    for index, cell in enumerate(network.cells):
        tables = {
            name.removeprefix(f"cells.{index}."): value
            for name, value in packed.items()
            if name.startswith(f"cells.{index}.")
        }
        yield from _dense_pairs(cell.preprocess0, tables["preprocess0"])
        yield from _dense_pairs(cell.preprocess1, tables["preprocess1"])
        slot = 0
        for edge, mixed in enumerate(cell.edges):
            if mixed.stride == 2:
                yield from _dense_pairs(mixed.ops[3], tables["reduce"][slot])
                slot += 1
            yield from _edge_pairs(mixed, tables, edge)


def _dense_pairs(module: nn.Module, matrix: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    dense = matrix.t()[:, :, None, None]
    if isinstance(module, FactorizedReduce):
        half = len(module.even.weight)
        yield module.even.weight, dense[:half]
        yield module.odd.weight, dense[half:]
    else:
        yield module.conv.weight, dense


def _edge_pairs(
    mixed: MixedOp, tables: Mapping[str, Tensor], edge: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    # (operation, place in its Sequential, table of the depthwise one, stage, pointwise slot)
    layout = (
        (4, 1, "depthwise3", 0, 0),
        (4, 5, "depthwise3", 1, 1),
        (5, 1, "depthwise5", 0, 2),
        (5, 5, "depthwise5", 1, 3),
        (6, 1, "depthwise3", 2, 4),
        (7, 1, "depthwise5", 2, 5),
    )
    for operation, place, table, stage, slot in layout:
        taps = tables[table][edge, stage].permute(2, 0, 1)[:, None]
        yield mixed.ops[operation][place].weight, taps
        dense = tables["pointwise"][edge, slot].t()[:, :, None, None]
        yield mixed.ops[operation][place + 1].weight, dense


def statistics_pairs(
    network: Network, supernet: Supernet
) -> Iterator[tuple[nn.BatchNorm2d, Tensor, Tensor]]:
    """Each normalisation of ``network`` with the running mean and variance of its packed twin."""
    packings = [supernet.stem_statistics, *(plan.statistics for plan in supernet.plans)]
    sizes = [packing.size for packing in packings]
    pieces = [
        (packing.unpack(mean), packing.unpack(variance))
        for packing, mean, variance in zip(
            packings,
            supernet.running_mean.split(sizes),
            supernet.running_variance.split(sizes),
            strict=True,
        )
    ]
    yield network.stem[1], pieces[0][0]["stem"], pieces[0][1]["stem"]
    for cell, (mean, variance) in zip(network.cells, pieces[1:], strict=True):
        for module, table, index in _cell_norms(cell):
            yield module, mean[table][index], variance[table][index]


def _cell_norms(cell: Cell) -> Iterator[tuple[nn.BatchNorm2d, str, tuple[int, ...]]]:
    yield cell.preprocess0.norm, "preprocess", (0,)
    yield cell.preprocess1.norm, "preprocess", (1,)
    slot = 0
    for node in range(2, 6):
        for source in range(node):
            edge = FIRST_EDGE[node] + source
            ops = cell.edges[edge].ops
            for pool in range(2):  # all edges from one state share the packed twin
                yield ops[1 + pool][1], "pools", (source, pool)
            if cell.edges[edge].stride == 2:
                yield ops[3].norm, "reduce", (slot,)
                slot += 1
            places = ((4, 3), (4, 7), (5, 3), (5, 7), (6, 3), (7, 3))
            for convolution, (operation, place) in enumerate(places):
                yield ops[operation][place], "convolutions", (edge, convolution)

"""Final networks of the DARTS space: a genotype's cells in a CIFAR or ImageNet skeleton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.architecture import Skeleton
from nas.errors import ConfigurationError
from nas.ops.primitives import PRIMITIVES, FactorizedReduce, ReLUConvBN
from nas.spaces.base import Network
from nas.spaces.darts.genotype import INPUTS, NODES, Gene, Genotype

if TYPE_CHECKING:
    from nas.data.task import TaskShape

STEM_MULTIPLIER = 3  # the CIFAR stem is this many times wider than the first cell's nodes


class Cell(nn.Module):
    """One cell: states of the two cells before to the concatenation of its nodes.

    In a reduction cell the operations on the two inputs have stride 2. ``reduction_before`` says
    that the cell before was one, so that the older input is twice as large and is halved first.
    """

    def __init__(
        self,
        genes: tuple[Gene, ...],
        channels_before: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        reduction_before: bool,
    ) -> None:
        super().__init__()
        self.sources = tuple(gene.source for gene in genes)
        older = FactorizedReduce if reduction_before else ReLUConvBN
        self.preprocess0 = older(channels_before[0], channels)
        self.preprocess1 = ReLUConvBN(channels_before[1], channels)
        self.operations = nn.ModuleList(
            PRIMITIVES[gene.operation](channels, 2 if reduction and gene.source < INPUTS else 1)
            for gene in genes
        )

    def forward(self, state0: Tensor, state1: Tensor, keep: Tensor | None) -> Tensor:
        """[B, 4 channels, H', W'] from two states [B, C, H, W].

        ``keep`` [genes, B, 1, 1, 1] scales what each operation gives for each image (drop-path);
        an operation that is the identity is never scaled.
        """
        states = [self.preprocess0(state0), self.preprocess1(state1)]
        for node in range(len(NODES)):
            first, second = (self._path(states, 2 * node + side, keep) for side in range(2))
            states.append(first + second)
        return torch.cat(states[INPUTS:], dim=1)

    def _path(self, states: list[Tensor], index: int, keep: Tensor | None) -> Tensor:
        operation = self.operations[index]
        output = operation(states[self.sources[index]])
        if keep is None or isinstance(operation, nn.Identity):
            return output
        return output * keep[index].to(output.dtype)


class AuxiliaryHead(nn.Module):
    """The second classifier that helps the middle of the network to learn.

    Pools to 2x2 as the published networks do at their sizes, 8x8 (CIFAR) and 7x7 (ImageNet), and
    by adaptive averages at any other. The published ImageNet head has no last batch norm.
    """

    def __init__(self, channels: int, classes: int, *, last_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768) if last_norm else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, state: Tensor) -> Tensor:
        stride = {(8, 8): 3, (7, 7): 2}.get((state.shape[2], state.shape[3]))
        state = F.relu(state)
        if stride is None:
            pooled = F.adaptive_avg_pool2d(state, 2)
        else:
            pooled = F.avg_pool2d(state, 5, stride)
        return self.classifier(self.features(pooled).flatten(1))


class DartsNetwork(Network):
    """A stack of cells between a stem and a linear classifier (DARTS section 3).

    The reductions stand at L // 3 and 2 * L // 3 of L cells and double the channels; below three
    cells the two places coincide or come first, and the network is built all the same.
    """

    def __init__(
        self, genotype: Genotype, skeleton: Skeleton, shape: TaskShape, *, auxiliary: bool
    ) -> None:
        super().__init__()
        imagenet = skeleton.stem == "imagenet"
        self.stem = _imagenet_stem(skeleton, shape) if imagenet else _cifar_stem(skeleton, shape)
        channels = skeleton.channels
        first = channels if imagenet else STEM_MULTIPLIER * channels
        before = (first, first)
        reduced = imagenet  # the last stem convolution halves the resolution
        self.auxiliary_place = 2 * skeleton.cells // 3
        places = {skeleton.cells // 3, self.auxiliary_place}
        self.cells = nn.ModuleList()
        for place in range(skeleton.cells):
            reduction = place in places
            channels *= 2 if reduction else 1
            genes = genotype.reduce if reduction else genotype.normal
            cell = Cell(genes, before, channels, reduction=reduction, reduction_before=reduced)
            self.cells.append(cell)
            before, reduced = (before[1], len(NODES) * channels), reduction
        self.classifier = nn.Linear(before[1], shape.classes)
        if auxiliary:  # last, so that the other weights do not depend on it
            self.auxiliary_head = AuxiliaryHead(before[1], shape.classes, last_norm=not imagenet)

    def forward(self, images: Tensor) -> Tensor:
        return self._classify(self._states(images)[0])

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        last, middle = self._states(images)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(middle)
        return self._classify(last), auxiliary

    def _classify(self, state: Tensor) -> Tensor:
        return self.classifier(state.mean((2, 3)))  # global average pooling

    def _states(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last cell and of the one that the auxiliary head reads."""
        keep = self._draw_paths(images)
        older = self.stem[0](images)
        newer = self.stem[1](older)
        middle = newer
        for place, cell in enumerate(self.cells):
            older, newer = newer, cell(older, newer, None if keep is None else keep[place])
            if place == self.auxiliary_place:
                middle = newer
        return newer, middle

    def _draw_paths(self, images: Tensor) -> Tensor | None:
        """Drop-path factors [cells, genes, B, 1, 1, 1]: 0, or 1 / (1 - p) so that means stay.

        Raises:
            ConfigurationError: the probability is above zero and there is no generator.
        """
        probability = self.drop_path_probability
        if not self.training or probability == 0:
            return None
        generator = self.drop_path_generator
        if generator is None:
            raise ConfigurationError(
                f"training with drop-path probability {probability} needs a drop_path_generator"
            )
        size = (len(self.cells), 2 * len(NODES), len(images), 1, 1, 1)
        draws = torch.rand(size, generator=generator, device=generator.device)
        return ((draws >= probability) / (1 - probability)).to(images.device)


def _cifar_stem(skeleton: Skeleton, shape: TaskShape) -> nn.ModuleList:
    """Keeps the resolution; both inputs of the first cell are the stem's output."""
    channels = STEM_MULTIPLIER * skeleton.channels
    conv = nn.Conv2d(shape.channels, channels, 3, padding=1, bias=False)
    return nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(channels)), nn.Identity()])


def _imagenet_stem(skeleton: Skeleton, shape: TaskShape) -> nn.ModuleList:
    """Divides the resolution by 4, then by 2: the two inputs of the first cell."""
    channels = skeleton.channels

    def halve(channels_in: int, channels_out: int) -> nn.Module:
        return nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)

    stem0 = nn.Sequential(
        halve(shape.channels, channels // 2),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(),
        halve(channels // 2, channels),
        nn.BatchNorm2d(channels),
    )
    stem1 = nn.Sequential(nn.ReLU(), halve(channels, channels), nn.BatchNorm2d(channels))
    return nn.ModuleList([stem0, stem1])

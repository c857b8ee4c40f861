"""The weight-sharing supernet of the DARTS space, with every weight in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nas.errors import CheckpointError, ConfigurationError, UnknownNameError
from nas.ops.backend import AUTO, BFLOAT16, FLOAT32, STORAGES, choose
from nas.ops.mixed import EDGES, NODES, NONE, OPERATIONS, CellPlan, Statistics
from nas.ops.packing import Packing
from nas.ops.stem import stem_weights
from nas.randomness import generator
from nas.spaces.base import PRUNED, LinearClassifier, TensorGroups
from nas.spaces.darts.genotype import Genotype, derive

if TYPE_CHECKING:
    from nas.data import TaskShape

NORMAL, REDUCE = range(2)
STEM_MULTIPLIER = 3
MAX_CELLS = 1000  # far above any paper's; a file must not make us plan for ever


@dataclass(frozen=True)
class SupernetConfig:
    """The size of a supernet.

    Attributes:
        channels: initial channels C (the paper's 16).
        cells: number of cells L (the paper's 8); reductions at L // 3 and 2 L // 3.
        partial: K of PC-DARTS: only C / K channels go through the mixed operation. 1 is DARTS.
        edge_normalisation: one beta per edge beside the alphas (PC-DARTS, section 3.3).
    """

    channels: int = 16
    cells: int = 8
    partial: int = 1
    edge_normalisation: bool = False

    def __post_init__(self) -> None:
        if self.channels < 1 or self.partial < 1:
            raise ConfigurationError(
                "a supernet needs channels and partial channels of at least 1, not "
                f"{self.channels} and {self.partial}"
            )
        if self.cells > MAX_CELLS:
            raise ConfigurationError(f"a supernet has at most {MAX_CELLS} cells, not {self.cells}")
        if self.cells < 3:
            raise ConfigurationError(
                f"a supernet of {self.cells} cells has no normal cell to search: it needs at least "
                "3, of which two are reductions"
            )
        if self.channels % 2:
            raise ConfigurationError(
                f"a supernet needs an even number of channels, not {self.channels}: each "
                "reduction splits them in halves, and so will the network of its cells"
            )
        if self.channels % self.partial:
            raise ConfigurationError(
                f"partial channels need channels divisible by K: {self.channels} is not "
                f"divisible by {self.partial}"
            )


@dataclass(frozen=True)
class Mixing:
    """How strongly each operation of each edge counts in a forward pass.

    Attributes:
        operations: [2, 14, 8], normal and reduction cells, edges, operations.
        edges: [2, 14] edge weights, or None where a node is the plain sum of its edges.
        active: [2, 14, 8] booleans on the CPU: what is False costs nothing. None: everything.
    """

    operations: Tensor
    edges: Tensor | None = None
    active: Tensor | None = None

    def detach(self) -> Mixing:
        """The same weights, cut off from the architecture parameters."""
        edges = None if self.edges is None else self.edges.detach()
        return Mixing(self.operations.detach(), edges, self.active)

    def live(self) -> Tensor | None:
        """Which operations are computed: active ones whose weight is not exactly zero.

        An operation of weight zero adds nothing, gets no gradient and gathers no statistics.
        Inside ``torch.compile`` and while a CUDA graph is captured values are unknown, and only
        ``active`` counts.
        """
        capturing = self.operations.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing:
            return self.active
        weighted = (self.operations.detach() != 0).cpu()
        return weighted if self.active is None else weighted & self.active

    def discretised(self, genotype: Genotype) -> Mixing:
        """Only the genotype's operations, each with weight 1; edge weights as they are.

        The other edges get weight zero: their operations and, with partial channels, what passes
        them by are no part of the discrete cell.
        """
        chosen = torch.zeros(self.operations.shape, dtype=torch.bool)
        for cell, genes in enumerate((genotype.normal, genotype.reduce)):
            for position, gene in enumerate(genes):
                edge = EDGES.index((gene.source, 2 + position // 2))
                chosen[cell, edge, OPERATIONS.index(gene.operation)] = True
        kept = chosen.any(-1).to(self.operations)
        edges = kept if self.edges is None else self.edges * kept
        return Mixing(chosen.to(self.operations), edges, chosen)


class Supernet(nn.Module):
    """Every network of the DARTS space at once.

    ``backend`` is "auto", "native" or "eager": who computes the cells (:mod:`nas.ops.backend`).
    ``storage`` is "float32", or "bfloat16" for cells that keep images, states and their gradients
    in half the memory; they compute in single precision all the same, as all else is stored.

    ``weights`` is one flat parameter, ``alphas`` [2, 14, 8] (and ``betas`` [2, 14] with edge
    normalisation) are the architecture parameters; running statistics are flat buffers. The
    normalisations keep no count of batches: with a fixed momentum nothing reads it.

    ``dropped`` [2, 14, 8] tells which operations a search in stages has dropped: 0 for one that is
    still there, and otherwise the number, from 1, of the stage after which it went.
    """

    running_mean: Tensor
    running_variance: Tensor
    dropped: Tensor

    def __init__(
        self,
        shape: TaskShape,
        config: SupernetConfig,
        *,
        seed: int,
        backend: str = AUTO,
        storage: str = FLOAT32,
    ) -> None:
        super().__init__()
        if storage not in STORAGES:
            raise UnknownNameError("storage", storage, STORAGES)
        self.backend = choose(backend)
        self.storage = storage
        self.shape = shape
        self.config = config
        self.plans = _plan_cells(config)
        self.weight_packings = weight_packings(shape, config)
        self.stem = self.weight_packings[0][1]
        self.stem_statistics = Packing({"stem": self.stem.shapes["scale"]})
        self.classifier = self.weight_packings[-1][1]

        self.weights = nn.Parameter(self._initial_weights(generator(seed, "supernet", "weights")))
        draw = generator(seed, "supernet", "architecture")
        self.alphas = nn.Parameter(1e-3 * torch.randn(2, len(EDGES), 8, generator=draw))
        self.betas = (
            nn.Parameter(1e-3 * torch.randn(2, len(EDGES), generator=draw))
            if config.edge_normalisation
            else None
        )
        statistics = sum(packing.size for packing in self._statistics_packings())
        self.register_buffer("running_mean", torch.zeros(statistics))
        self.register_buffer("running_variance", torch.ones(statistics))
        self.register_buffer("dropped", torch.zeros(self.alphas.shape, dtype=torch.uint8))

    @property
    def incoming(self) -> list[int]:
        """Number of edges that enter each node, in the order of the edges."""
        return [sum(target == node for _, target in EDGES) for node in range(2, 2 + NODES)]

    def active_alphas(self) -> Tensor:
        """The alphas [2, 14, 8], minus infinity where the operation was dropped.

        A softmax gives such an operation the weight 0 and the gradient 0, whatever an optimiser
        makes of its alpha.
        """
        return self.alphas.masked_fill(self.dropped != 0, -math.inf)

    def check_operations(self) -> None:
        """Return if ``dropped`` is what stages can have left, and not what a file made up.

        Raises:
            CheckpointError: an edge has no operation that a genotype may choose, or there were
                more stages than operations.
        """
        if int(self.dropped.max()) >= len(OPERATIONS):
            raise CheckpointError(
                f"the supernet lost operations after stage {int(self.dropped.max())}, but there "
                f"are only {len(OPERATIONS)} to lose"
            )
        choices = (self.dropped == 0)[..., NONE + 1 :].any(-1)
        if not choices.all():
            raise CheckpointError(
                f"the supernet has {int((~choices).sum())} edges on which all operations were "
                "dropped"
            )

    def derive(self, mixing: Mixing) -> Genotype:
        """The discrete cells that ``mixing`` stands for (DARTS, section 2.4)."""
        return derive(mixing.operations.detach(), mixing.edges)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """The alphas and, where there are any, the betas."""
        return [self.alphas] if self.betas is None else [self.alphas, self.betas]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight tensor under its own name ("cells.3.pointwise"), as a view."""
        for prefix, packing, piece in self._pieces(self.weights):
            for name, view in packing.unpack(piece).items():
                yield f"{prefix}.{name}", view

    def signature(self) -> dict[str, Any]:
        """What another supernet must share to go on from this one; see ``WeightSharing``."""
        return signature(self.config, pruned=bool(self.dropped.any()))

    def groups(self) -> TensorGroups:
        """Views of all tensors, by the part they play on another data set."""
        stem: dict[str, Tensor] = {}
        trunk: dict[str, Tensor] = {}
        classifier: dict[str, Tensor] = {}
        parts = {"stem": stem, "classifier": classifier}
        for prefix, packing, piece in self._pieces(self.weights.detach()):
            views = packing.unpack(piece).items()
            parts.get(prefix, trunk).update({f"{prefix}.{name}": view for name, view in views})
        size = self.stem_statistics.size
        for name in ("running_mean", "running_variance"):
            stem[name], trunk[name] = getattr(self, name)[:size], getattr(self, name)[size:]
        architecture = {"alphas": self.alphas.detach()}
        if self.betas is not None:
            architecture["betas"] = self.betas.detach()
        operations = {"dropped": self.dropped}
        return TensorGroups(trunk, stem, {"stem.filters": 2}, classifier, architecture, operations)

    def linear_classifier(self) -> LinearClassifier:
        """Matrix and bias of the classifier, which is given :meth:`features`."""
        _, packing, piece = self._pieces(self.weights.detach())[-1]
        return LinearClassifier(**packing.unpack(piece))

    def forward(
        self,
        images: Tensor,
        mixing: Mixing,
        *,
        weights: Tensor | None = None,
        update_statistics: bool = True,
    ) -> Tensor:
        """Class scores [N, classes] of ``images`` [N, channels, H, W].

        ``weights`` puts another vector in the place of the supernet's own (the unrolled twin of
        second-order DARTS); ``update_statistics=False`` then leaves the running statistics.
        """
        stem, cells, classifier = self._split(self.weights if weights is None else weights)
        head = self.classifier.unpack(classifier)
        pooled = self._pooled(images, mixing, stem, cells, update_statistics)
        return pooled @ head["matrix"] + head["bias"]

    def features(self, images: Tensor, mixing: Mixing) -> Tensor:
        """What the classifier is given: [N, 4 C of the last cell], the mean over the last map.

        Running statistics stay as they are.
        """
        stem, cells, _ = self._split(self.weights)
        return self._pooled(images, mixing, stem, cells, update=False)

    def _pooled(
        self, images: Tensor, mixing: Mixing, stem: Tensor, cells: Tensor, update: bool
    ) -> Tensor:
        of_stem, of_cells = self._statistics(update)
        x = self.backend.stem(images.device)(images, stem, of_stem, self._stored())
        mixed_cells = self.backend.mixed_cells(images.device)
        output = mixed_cells(
            self.plans,
            x,
            x,
            cells,
            of_cells,
            self._of_cells(mixing.operations),
            None if mixing.edges is None else self._of_cells(mixing.edges),
            None if (active := mixing.live()) is None else self._of_cells(active),
        )
        return output.to(self.weights.dtype).mean((2, 3))

    def _of_cells(self, of_kinds: Tensor) -> Tensor:
        """[2, ...] of normal and reduction cells as [cells, ...]."""
        kinds = of_kinds.unbind()
        return torch.stack([kinds[REDUCE if plan.reduction else NORMAL] for plan in self.plans])

    def _stored(self) -> torch.dtype:
        """What images are of between the cells.

        Raises:
            ConfigurationError: the supernet is not in single precision, and its storage is.
        """
        computed = self.weights.dtype
        if self.storage != BFLOAT16:
            return computed
        if computed != torch.float32:
            raise ConfigurationError(
                f"storage 'bfloat16' needs a supernet in float32, not {computed}; storage "
                "'float32' is that of the weights"
            )
        return torch.bfloat16

    def _statistics_packings(self) -> list[Packing]:
        return [self.stem_statistics, *(plan.statistics for plan in self.plans)]

    def _pieces(self, flat: Tensor) -> list[tuple[str, Packing, Tensor]]:
        packings = self.weight_packings
        pieces = flat.split([packing.size for _, packing in packings])
        return [
            (name, packing, piece) for (name, packing), piece in zip(packings, pieces, strict=True)
        ]

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The weights of the stem, of all cells and of the classifier."""
        ends = self.stem.size, self.classifier.size
        return flat.split([ends[0], flat.numel() - sum(ends), ends[1]])

    def _statistics(self, update: bool) -> tuple[Statistics, ...]:
        """Of the stem and of all cells."""
        ends = [self.stem_statistics.size, self.running_mean.numel() - self.stem_statistics.size]
        means, variances = self.running_mean.split(ends), self.running_variance.split(ends)
        return tuple(
            Statistics(mean, variance, self.training, update)
            for mean, variance in zip(means, variances, strict=True)
        )

    def _initial_weights(self, draw: torch.Generator) -> Tensor:
        """PyTorch's default initialisation: uniform within 1 / sqrt(fan-in)."""
        pieces = []
        for _, packing in self.weight_packings:
            for name, shape in packing.shapes.items():
                if name in ("scale", "shift"):
                    value = torch.full(shape, float(name == "scale"))
                else:
                    bound = 1 / math.sqrt(_fan_in(name, shape, self.classifier))
                    value = torch.empty(shape).uniform_(-bound, bound, generator=draw)
                pieces.append(value.flatten())
        return torch.cat(pieces)


def signature(config: SupernetConfig, *, pruned: bool) -> dict[str, Any]:
    """The signature of a supernet of this configuration, which need not be built."""
    return {"space": "darts", "operations": list(OPERATIONS), PRUNED: pruned, **asdict(config)}


def weight_packings(shape: TaskShape, config: SupernetConfig) -> list[tuple[str, Packing]]:
    """The layout of the flat weight vector: stem, cells and classifier, by name."""
    plans = _plan_cells(config)
    stem, out = STEM_MULTIPLIER * config.channels, 4 * plans[-1].channels
    return [
        ("stem", stem_weights(shape.channels, stem)),
        *((f"cells.{index}", plan.weights) for index, plan in enumerate(plans)),
        ("classifier", Packing({"matrix": (out, shape.classes), "bias": (shape.classes,)})),
    ]


def _fan_in(name: str, shape: tuple[int, ...], classifier: Packing) -> int:
    """Inputs that one output sums over, by what the tensor is."""
    if name == "filters":
        return math.prod(shape[:3])
    if name.startswith("depthwise"):
        return shape[2] * shape[3]
    if name == "bias":
        return classifier.shapes["matrix"][0]
    return shape[-2]  # matrices [..., in, out]


def _plan_cells(config: SupernetConfig) -> list[CellPlan]:
    reductions = {config.cells // 3, 2 * config.cells // 3}
    before = previous = STEM_MULTIPLIER * config.channels
    channels, previous_reduction = config.channels, False
    plans = []
    for index in range(config.cells):
        reduction = index in reductions
        channels *= 2 if reduction else 1
        plans.append(
            CellPlan(before, previous, channels, config.partial, reduction, previous_reduction)
        )
        before, previous, previous_reduction = previous, 4 * channels, reduction
    return plans

"""The DARTS space as named decisions, and the networks it builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from nas.architecture import Architecture, Skeleton
from nas.errors import ArchitectureError, ConfigurationError
from nas.ops.backend import AUTO, FLOAT32
from nas.ops.primitives import initialise
from nas.spaces.darts.genotype import NODES, OPERATIONS, Gene, Genotype
from nas.spaces.darts.network import DartsNetwork
from nas.spaces.darts.supernet import Supernet, SupernetConfig, signature, weight_packings

if TYPE_CHECKING:
    from nas.data.task import TaskShape

CELLS = ("normal", "reduce")


@dataclass(frozen=True)
class DartsSpace:
    """Two cell types, four nodes each, two distinct inputs a node, seven operations an input.

    A node has the decisions ``<cell>.<node>.inputs`` (choices such as "0,2"), ``.op0`` for the
    smaller of the two inputs, and ``.op1`` for the larger.
    """

    name: str = "darts"

    def decisions(self) -> dict[str, tuple[str, ...]]:
        """Every decision's name and choices, in the canonical order."""
        choices: dict[str, tuple[str, ...]] = {}
        for cell in CELLS:
            for node in NODES:
                choices[f"{cell}.{node}.inputs"] = tuple(
                    f"{first},{second}" for first, second in combinations(range(node), 2)
                )
                choices[f"{cell}.{node}.op0"] = OPERATIONS[1:]
                choices[f"{cell}.{node}.op1"] = OPERATIONS[1:]
        return choices

    def architecture(self, decisions: Mapping[str, str], skeleton: Skeleton) -> Architecture:
        """The architecture of those decisions.

        Raises:
            ArchitectureError: a decision is missing, unknown, or not one of the choices, or the
                skeleton's channels are odd.
        """
        known = self.decisions()
        if not isinstance(decisions, Mapping):
            raise ArchitectureError(f"decisions are choices by name, not {decisions!r}")
        for name in decisions:
            if name not in known:
                raise ArchitectureError(f"{name!r} is no decision of the {self.name} space")
        for name, choices in known.items():
            if name not in decisions:
                raise ArchitectureError(f"the decision {name!r} is missing")
            if decisions[name] not in choices:
                raise ArchitectureError(
                    f"{name!r} is {decisions[name]!r}; its choices are {' '.join(choices)}"
                )
        _check_skeleton(skeleton)
        return Architecture(self.name, tuple((name, decisions[name]) for name in known), skeleton)

    def from_genotype(self, genotype: Genotype, skeleton: Skeleton) -> Architecture:
        """The architecture of a genotype; :meth:`genotype` is the way back.

        Raises:
            ArchitectureError: the skeleton's channels are odd.
        """
        decisions = {
            **_cell_decisions("normal", genotype.normal),
            **_cell_decisions("reduce", genotype.reduce),
        }
        return self.architecture(decisions, skeleton)

    def genotype(self, architecture: Architecture) -> Genotype:
        """The cells of an architecture of this space.

        Raises:
            ArchitectureError: the architecture is of another space or not a valid one of this.
        """
        if architecture.space != self.name:
            raise ArchitectureError(
                f"an architecture of space {architecture.space!r} is no {self.name} architecture"
            )
        decisions = dict(architecture.decisions)
        self.architecture(decisions, architecture.skeleton)
        return Genotype(_cell_genes("normal", decisions), _cell_genes("reduce", decisions))

    def meta_network(
        self, architecture: Architecture, shape: TaskShape, *, auxiliary: bool
    ) -> DartsNetwork:
        """The network on the meta device: it can be counted, and takes no memory."""
        genotype = self.genotype(architecture)
        with torch.device("meta"):
            return DartsNetwork(genotype, architecture.skeleton, shape, auxiliary=auxiliary)

    def network(
        self,
        architecture: Architecture,
        shape: TaskShape,
        *,
        auxiliary: bool,
        generator: torch.Generator,
    ) -> DartsNetwork:
        """The network with weights drawn from ``generator``, on the generator's device."""
        return initialise(self.meta_network(architecture, shape, auxiliary=auxiliary), generator)

    def supernet(
        self,
        shape: TaskShape,
        config: SupernetConfig,
        *,
        seed: int,
        backend: str = AUTO,
        storage: str = FLOAT32,
    ) -> Supernet:
        """All networks of the space at once, for a differentiable search."""
        return Supernet(shape, config, seed=seed, backend=backend, storage=storage)

    def supernet_config(self, values: Mapping[str, Any]) -> SupernetConfig:
        """The configuration of a supernet from its fields, as ``dataclasses.asdict`` gives them.

        Raises:
            ConfigurationError: a field is unknown or impossible.
        """
        try:
            return SupernetConfig(**values)
        except TypeError as error:
            raise ConfigurationError(
                f"{dict(values)!r} is no configuration of a {self.name} supernet: its fields are "
                f"{', '.join(field.name for field in fields(SupernetConfig))}"
            ) from error

    def signature(self, config: SupernetConfig) -> dict[str, Any]:
        """What two supernets must share for the tensors of one to fit the other."""
        return signature(config, pruned=False)

    def weight_shapes(self, shape: TaskShape, config: SupernetConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of such a supernet's weights; nothing is built."""
        return {
            f"{prefix}.{name}": tuple(size)
            for prefix, packing in weight_packings(shape, config)
            for name, size in packing.shapes.items()
        }


def _check_skeleton(skeleton: Skeleton) -> None:
    if type(skeleton.channels) is not int or skeleton.channels % 2:
        raise ArchitectureError(
            f"a DARTS network needs an even number of channels, not {skeleton.channels!r}: "
            "each reduction splits them in halves"
        )
    if type(skeleton.cells) is not int:
        raise ArchitectureError(f"the number of cells is a whole number, not {skeleton.cells!r}")


def _cell_decisions(cell: str, genes: Sequence[Gene]) -> dict[str, str]:
    decisions: dict[str, str] = {}
    for node, first, second in zip(NODES, genes[::2], genes[1::2], strict=True):
        decisions[f"{cell}.{node}.inputs"] = f"{first.source},{second.source}"
        decisions[f"{cell}.{node}.op0"] = first.operation
        decisions[f"{cell}.{node}.op1"] = second.operation
    return decisions


def _cell_genes(cell: str, decisions: Mapping[str, str]) -> tuple[Gene, ...]:
    genes: list[Gene] = []
    for node in NODES:
        sources = decisions[f"{cell}.{node}.inputs"].split(",")
        for index, source in enumerate(sources):
            genes.append(Gene(decisions[f"{cell}.{node}.op{index}"], int(source)))
    return tuple(genes)

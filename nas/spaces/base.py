"""What every search space can do, and what every network of a space is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nas.architecture import Architecture, Skeleton

if TYPE_CHECKING:
    from nas.data.task import TaskShape
    from nas.spaces.darts.supernet import Supernet, SupernetConfig

PRUNED = "pruned"  # of a signature: whether a search in stages has dropped operations


class Network(nn.Module):
    """A concrete network of a space: images [B, channels, height, width] to logits [B, classes].

    Attributes:
        auxiliary_head: second classifier in the middle of the network, or None. It serves
            training only and counts neither as parameters nor as multiply-adds.
        drop_path_probability: chance that training drops a path of an image; the trainer sets it
            every epoch.
        drop_path_generator: where the dropped paths are drawn from. Training with a probability
            above zero needs one.
    """

    auxiliary_head: nn.Module | None
    drop_path_probability: float
    drop_path_generator: torch.Generator | None

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary_head = None
        self.drop_path_probability = 0.0
        self.drop_path_generator = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]; the auxiliary head does not run."""
        raise NotImplementedError

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and auxiliary logits, both [B, classes]; None where there is no head."""
        raise NotImplementedError


@dataclass(frozen=True)
class TensorGroups:
    """The tensors of a supernet by the part they play when it serves another data set.

    Every tensor is a view of the supernet's own memory: what is written into it, the supernet has.

    Attributes:
        trunk: what lies between stem and classifier, with its running statistics.
        stem: what sees the image's channels, with its running statistics.
        image_axes: of those tensors of ``stem`` that depend on the number of image channels, the
            axis of these channels.
        classifier: what depends on the classes.
        architecture: the architecture parameters.
        operations: which of the operations are left, and when the others were dropped.
    """

    trunk: Mapping[str, Tensor]
    stem: Mapping[str, Tensor]
    image_axes: Mapping[str, int]
    classifier: Mapping[str, Tensor]
    architecture: Mapping[str, Tensor]
    operations: Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearClassifier:
    """What ends a supernet of any space: scores are ``features @ matrix + bias``.

    Views of the supernet's own memory: ``matrix`` [D, classes] and ``bias`` [classes]. Several data
    sets have blocks of columns, one after the other.
    """

    matrix: Tensor
    bias: Tensor


class WeightSharing(Protocol):
    """What a supernet of any space must tell so that another one can go on from it."""

    def signature(self) -> dict[str, Any]:
        """JSON-able: what two supernets must share for the tensors of one to fit the other.

        "space", its "operations" and ``PRUNED``; channels, cells and whatever else gives the
        tensors their shapes; not the task.
        """

    def groups(self) -> TensorGroups:
        """All tensors, by their part."""

    def linear_classifier(self) -> LinearClassifier:
        """The tensors of the part ``classifier``, by what they compute."""


class Space(Protocol):
    """A set of architectures, described by named decisions with a fixed list of choices each."""

    @property
    def name(self) -> str:
        """The key of the space in ``nas.spaces.SPACES``."""

    def decisions(self) -> dict[str, tuple[str, ...]]:
        """Every decision's name and choices; any combination is a valid architecture."""

    def architecture(self, decisions: Mapping[str, str], skeleton: Skeleton) -> Architecture:
        """The architecture of those decisions.

        Raises:
            ArchitectureError: a decision is missing, unknown, or not one of the choices, or the
                space cannot build that skeleton.
        """

    def meta_network(
        self, architecture: Architecture, shape: TaskShape, *, auxiliary: bool
    ) -> Network:
        """The network on the meta device: it can be counted, and takes no memory."""

    def network(
        self,
        architecture: Architecture,
        shape: TaskShape,
        *,
        auxiliary: bool,
        generator: torch.Generator,
    ) -> Network:
        """The network with weights drawn from ``generator``, on the generator's device."""

    def supernet(
        self,
        shape: TaskShape,
        config: SupernetConfig,
        *,
        seed: int,
        backend: str = "auto",
        storage: str = "float32",
    ) -> Supernet:
        """All networks of the space at once, with shared weights drawn from ``seed``."""

    def supernet_config(self, values: Mapping[str, Any]) -> SupernetConfig:
        """The configuration of a supernet from its fields, as ``dataclasses.asdict`` gives them.

        Raises:
            ConfigurationError: a field is unknown or impossible.
        """

    def signature(self, config: SupernetConfig) -> dict[str, Any]:
        """The ``signature`` of a fresh supernet of this configuration, which need not be built."""

    def weight_shapes(self, shape: TaskShape, config: SupernetConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of such a supernet's weights; nothing is built."""

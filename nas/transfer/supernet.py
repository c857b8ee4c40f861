"""The `supernet` transfer: a search that begins with another data set's supernet.

Singh & Vanschoren, arXiv 2407.20279: weights and architecture parameters of a source's supernet
are both fine-tuned on the target, which reaches the same accuracy in fewer epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nas.errors import CheckpointError, ConfigurationError, UnknownNameError
from nas.search.method import SearchConfig
from nas.spaces.base import TensorGroups, WeightSharing

WEIGHTS, ALPHAS, BOTH = WHAT = ("weights", "alphas", "both")


@dataclass(frozen=True)
class WarmStartOptions:
    """What moves, and how far it may move on.

    Attributes:
        what: "weights" (trunk and stem), "alphas" (the architecture parameters), or "both".
        alpha_temperature: T >= 1; the source's architecture parameters are divided by it. The
            mixing weights of a finished source are decided, and those divided by T less so.
        learning_rate_scale: above 0; multiplies the learning rates of the target's weights.
    """

    what: str = BOTH
    alpha_temperature: float = 1.0
    learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise UnknownNameError("part of a supernet", self.what, WHAT)
        if not 1 <= self.alpha_temperature < math.inf:
            raise ConfigurationError(
                f"the temperature of the alphas is a number of at least 1, which leaves them as "
                f"they are, not {self.alpha_temperature}"
            )
        if not 0 < self.learning_rate_scale < math.inf:
            raise ConfigurationError(
                f"the learning rate is scaled by a number above 0, not {self.learning_rate_scale}"
            )

    def scaled(self, config: SearchConfig) -> SearchConfig:
        """``config`` with the learning rates of the weights scaled."""
        return replace(
            config,
            learning_rate=config.learning_rate * self.learning_rate_scale,
            learning_rate_end=config.learning_rate_end * self.learning_rate_scale,
        )


@dataclass(frozen=True, eq=False)
class WarmStart:
    """A source supernet and how to go on from it.

    Attributes:
        digest: names the source's file; it belongs to the identity of the search.
    """

    source: WeightSharing
    digest: str
    options: WarmStartOptions

    def identity(self) -> dict[str, Any]:
        """What tells this beginning from others."""
        return {"source": self.digest, **asdict(self.options)}

    def apply(self, target: WeightSharing) -> None:
        """Overwrite ``target``, fresh from its seed, by what moves; the classifier stays new.

        Raises:
            CheckpointError: the two supernets differ in more than their task.
        """
        require_compatible(self.source.signature(), target.signature())
        source, own = self.source.groups(), target.groups()
        if self.options.what != ALPHAS:
            _copy(source.trunk, own.trunk)
            _copy(_adapted_stem(source, own), own.stem)
        if self.options.what != WEIGHTS:
            alphas = {
                name: alpha / self.options.alpha_temperature
                for name, alpha in source.architecture.items()
            }
            _copy(alphas, own.architecture)


def require_compatible(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Return if supernets of these signatures have the same trunk.

    Raises:
        CheckpointError: they do not; the message names both sides of the first difference.
    """
    for name in {**target, **source}:
        if name not in source or name not in target or source[name] != target[name]:
            ours, theirs = source.get(name, "nothing"), target.get(name, "nothing")
            raise CheckpointError(
                f"the source supernet does not fit: its {name.replace('_', ' ')} is {ours}, but "
                f"that of the search is {theirs}"
            )


def adapt_channels(filters: Tensor, axis: int, channels: int) -> Tensor:
    """Stem filters for another number of image channels.

    Every new channel gets the mean of what the old ones had together: sum / ``channels``. A grey
    image then gives what its copy in three equal channels gave, and the other way round.
    """
    if filters.shape[axis] == channels:
        return filters
    total = filters.sum(axis, keepdim=True) / channels
    return total.expand([channels if d == axis else -1 for d in range(filters.ndim)])


def _adapted_stem(source: TensorGroups, target: TensorGroups) -> dict[str, Tensor]:
    return {
        name: adapt_channels(tensor, axis, target.stem[name].shape[axis])
        if (axis := source.image_axes.get(name)) is not None
        else tensor
        for name, tensor in source.stem.items()
    }


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Strictly: the same names, the same shapes."""
    for name in {**target, **source}:
        if name not in source or name not in target or source[name].shape != target[name].shape:
            raise CheckpointError(f"the source supernet does not fit: its tensor '{name}' does not")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])

"""The `supernet` transfer: a search that begins with another data set's supernet.

Singh & Vanschoren, arXiv 2407.20279: weights and architecture parameters of a source's supernet
are both fine-tuned on the target, which reaches the same accuracy in fewer epochs. Of a search in
stages its operation sets can move, too, and only the last stages run on the target: warm-started
DARTS, arXiv 2205.06355.
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
from nas.search.stages import dropped_before
from nas.spaces.base import PRUNED, TensorGroups, WeightSharing

WEIGHTS, ALPHAS, BOTH, OPERATIONS = WHAT = ("weights", "alphas", "both", "operations")


@dataclass(frozen=True)
class WarmStartOptions:
    """What moves, and how far it may move on.

    Attributes:
        what: "weights" (trunk and stem), "alphas" (the architecture parameters), "both", or with
            ``stages`` "operations": the operation sets and nothing else.
        alpha_temperature: T >= 1; the source's architecture parameters are divided by it. The
            mixing weights of a finished source are decided, and those divided by T less so.
        learning_rate_scale: above 0; multiplies the learning rates of the target's weights.
        stages: of a search in stages only so many run, the last ones. They begin with the
            operations that each edge of the source had at their start. 0: all run.
    """

    what: str = BOTH
    alpha_temperature: float = 1.0
    learning_rate_scale: float = 1.0
    stages: int = 0

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
        if self.stages < 0 or (self.stages == 0 and self.what == OPERATIONS):
            raise ConfigurationError(
                "operation sets move into the last stages of a search, of which at least 1 runs, "
                f"not {self.stages}"
            )
        if self.stages > 1 and self.what != OPERATIONS:
            raise ConfigurationError(
                f"weights and alphas of a source are those of its last stage: the last "
                f"{self.stages} stages can begin with its '{OPERATIONS}', not with '{self.what}'"
            )

    def adapted(self, config: SearchConfig) -> SearchConfig:
        """``config`` with the stages that run, and the learning rates of the weights scaled.

        Raises:
            ConfigurationError: the search has no stage before those that shall run.
        """
        if self.stages >= len(config.stages):
            raise ConfigurationError(
                f"the last {self.stages} stages cannot begin with another search's operations: "
                f"this search has {len(config.stages)} in all, and the first drops none"
            )
        return replace(
            config,
            stages=config.stages[-self.stages :],
            learning_rate=config.learning_rate * self.learning_rate_scale,
            learning_rate_end=config.learning_rate_end * self.learning_rate_scale,
        )

    def required(self, signature: Mapping[str, Any]) -> dict[str, Any]:
        """What a source's signature must have; ``signature`` is the fresh target's."""
        wanted = {**signature, PRUNED: self.stages > 0}
        if self.what != OPERATIONS:
            return wanted
        return {name: wanted[name] for name in ("space", "operations", PRUNED)}


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
        return {
            "source": self.digest,
            "fits_classifier": self.fits_classifier,
            **asdict(self.options),
        }

    @property
    def fits_classifier(self) -> bool:
        """Where the trunk moves, its features are worth a classifier fitted to them."""
        return self.options.what in (WEIGHTS, BOTH)

    def apply(self, target: WeightSharing) -> None:
        """Overwrite ``target``, fresh from its seed, by what moves; the classifier stays new.

        Where weights moved, the search fits it to their features: ``fits_classifier``.

        Raises:
            CheckpointError: the two supernets differ in more than their task, or the source has
                no operation sets of the stages that shall run.
        """
        options = self.options
        require_compatible(self.source.signature(), options.required(target.signature()))
        source, own = self.source.groups(), target.groups()
        if options.stages:
            _copy(_operations_before(source.operations, options.stages), own.operations)
        if options.what in (WEIGHTS, BOTH):
            _copy(source.trunk, own.trunk)
            _copy(_adapted_stem(source, own), own.stem)
        if options.what in (ALPHAS, BOTH):
            alphas = {
                name: alpha / options.alpha_temperature
                for name, alpha in source.architecture.items()
            }
            _copy(alphas, own.architecture)


def require_compatible(source: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Return if a supernet of the signature ``source`` has all that is ``required`` of it.

    Raises:
        CheckpointError: it has not; the message names both sides of the first difference.
    """
    for name, wanted in required.items():
        if name in source and source[name] == wanted:
            continue
        if name == PRUNED:
            raise CheckpointError(
                "the source supernet has all its operations, and none that a search in stages kept"
                if wanted
                else "the source supernet was searched in stages, in which it lost operations: it "
                "can serve the last stages of another such search alone"
            )
        raise CheckpointError(
            f"the source supernet does not fit: its {name.replace('_', ' ')} is "
            f"{source.get(name, 'nothing')}, but that of the search is {wanted}"
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


def _operations_before(dropped: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """The operation sets with which the last ``stages`` stages of the source began."""
    first = max(int(numbers.max()) for numbers in dropped.values()) + 2 - stages
    if first < 2:
        raise CheckpointError(
            f"the source supernet was searched in {first + stages - 1} stages, so that before its "
            f"last {stages} nothing was dropped"
        )
    return {name: dropped_before(numbers, first) for name, numbers in dropped.items()}


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

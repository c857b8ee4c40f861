"""What a user asks for, in the words of the entry points."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nas.architecture import Architecture, Skeleton
from nas.data import DATA_SETS, ImageTask
from nas.data.catalog import FOLDER_PREFIX
from nas.errors import ConfigurationError, UnknownNameError
from nas.spaces import DartsSpace
from nas.training import TrainConfig
from nas.transfer.cell import restack


@dataclass(frozen=True)
class DataSettings:
    """A data set by name, and how much of it.

    ``image_size`` is a side that the user asked for; ``largest`` is what the preset can afford
    where the user asked for none.
    """

    name: str
    image_size: int | None = None
    limit: int | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        if not self.name.startswith(FOLDER_PREFIX) and self.name not in DATA_SETS:
            raise UnknownNameError("data set", self.name, DATA_SETS)


@dataclass(frozen=True)
class StackSettings:
    """The skeleton of the final network; a limit in multiply-adds sets the channels."""

    channels: int | None
    cells: int | None
    max_macs: int | None
    stem: str | None

    def __post_init__(self) -> None:
        if self.channels is not None and self.max_macs is not None:
            raise ConfigurationError(
                f"give --channels ({self.channels}) or --max-macs ({self.max_macs}), not both: "
                "the limit chooses the channels"
            )
        _cheapest_cells(Skeleton(self.stem or "cifar", self.channels or 2, self.cells or 1))

    def check(self, task: ImageTask) -> None:
        """Raise, before a search is paid for, where no cell at all keeps the limit."""
        self.apply(_cheapest_cells(Skeleton("cifar", 2, 1)), task)

    def apply(self, architecture: Architecture, task: ImageTask) -> Architecture:
        """The same cells in this skeleton, for the images of ``task``."""
        return restack(
            architecture,
            task.shape,
            channels=self.channels,
            cells=self.cells,
            max_macs=self.max_macs,
            stem=self.stem,
        )


def _cheapest_cells(skeleton: Skeleton) -> Architecture:
    """Cells of nothing but max pools, which take no multiply-adds."""
    space = DartsSpace()
    pools = {name: choices[0] for name, choices in space.decisions().items()}
    return space.architecture(pools, skeleton)


@dataclass(frozen=True)
class CompareSettings:
    """How a network is trained and compared on the target.

    Attributes:
        training: the recipe, for the transferred and the random networks alike.
        least_steps: a small set is gone through more often than the recipe says, until training
            has so many steps.
        seeds: trainings of the transferred network, and random networks beside it.
        seed: the first of the seeds.
        model_name: in the registry.
    """

    training: TrainConfig
    seeds: int
    seed: int
    model_name: str
    least_steps: int = 0

    def __post_init__(self) -> None:
        if not self.model_name.strip() or set(self.model_name) & set("/:'"):
            raise ConfigurationError(
                f"'{self.model_name}' cannot be a registered model's name: it needs a character "
                "and takes no slash, colon or quote; choose another --model-name"
            )

    def training_for(self, task: ImageTask) -> TrainConfig:
        """The recipe, with the epochs that ``task`` needs."""
        recipe = self.training
        steps = max(1, len(task.splits.train) // recipe.batch_size)
        return replace(recipe, epochs=max(recipe.epochs, math.ceil(self.least_steps / steps)))

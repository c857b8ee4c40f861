"""What a user asks for, in the words of the entry points."""

from __future__ import annotations

from dataclasses import dataclass

from nas.architecture import Architecture
from nas.data import ImageTask
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


@dataclass(frozen=True)
class StackSettings:
    """The skeleton of the final network; a limit in multiply-adds sets the channels."""

    channels: int | None
    cells: int | None
    max_macs: int | None
    stem: str | None

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


@dataclass(frozen=True)
class CompareSettings:
    """How a network is trained and compared on the target.

    Attributes:
        training: the recipe, for the transferred and the random networks alike.
        seeds: trainings of the transferred network, and random networks beside it.
        seed: the first of the seeds.
        model_name: in the registry.
    """

    training: TrainConfig
    seeds: int
    seed: int
    model_name: str

"""Scales of a whole job: what `quick` means for the search, the network and its training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nas.errors import UnknownNameError
from nas.search import Method, SearchConfig
from nas.training import TRAINING_PRESETS, TrainConfig


@dataclass(frozen=True)
class Preset:
    """One scale of a job.

    Attributes:
        summary: for people.
        channels, cells: of the final network.
        training: its recipe.
        least_steps: of a training, however small the set.
        largest: images above this side are scaled down to it, unless a size is asked for.
        threads: cores for a single step; None leaves it to PyTorch.
        quick_search: scale the search down to minutes on two cores, too.
    """

    summary: str
    channels: int
    cells: int
    training: TrainConfig
    least_steps: int = 0
    largest: int | None = None
    threads: int | None = None
    quick_search: bool = False

    def search(self, method: Method) -> SearchConfig:
        """The settings of ``method`` at this scale."""
        paper = method.paper_config()
        if not self.quick_search:
            return paper
        # Few steps: the architecture parameters must move further in each. The share of frozen
        # epochs is the paper's, and where its stages grow, each grows by a cell here.
        return replace(
            paper,
            supernet=replace(
                paper.supernet, channels=8, cells=4, partial=min(2, paper.supernet.partial)
            ),
            epochs=QUICK_SEARCH_EPOCHS,
            batch_size=64,
            learning_rate=0.1,
            learning_rate_end=0.001,
            architecture_learning_rate=6e-3,
            warmup_epochs=round(QUICK_SEARCH_EPOCHS * paper.warmup_epochs / paper.epochs),
            crop_padding=1,
            stages=tuple(
                replace(stage, deeper=min(number, stage.deeper))
                for number, stage in enumerate(paper.stages)
            ),
        )


QUICK_SEARCH_EPOCHS = 6
PRESETS = {
    "quick": Preset(
        "minutes on two cores: images of at most 14 pixels, a small network, few epochs",
        channels=8,
        cells=4,
        training=TRAINING_PRESETS["quick"],
        least_steps=150,  # 2 epochs of 4,800 images and more
        largest=14,
        threads=1,  # tensors this small are faster on one core than shared by two
        quick_search=True,
    ),
    "paper-cifar": Preset(
        "the papers' CIFAR-10 setting: 50 epochs of search, 20 cells, 600 epochs of training",
        channels=36,
        cells=20,
        training=TRAINING_PRESETS["paper-cifar"],
    ),
    "paper-imagenet": Preset(
        "the papers' ImageNet setting: 14 cells of 48 channels, 250 epochs of training",
        channels=48,
        cells=14,
        training=TRAINING_PRESETS["paper-imagenet"],
    ),
}


def find_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UnknownNameError: there is none of that name; the message suggests the nearest.
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]

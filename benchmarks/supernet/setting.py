"""What is measured: sizes of a search step, and why an implementation may sit one out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nas.data import ImageTask, TaskShape, TensorImages
from nas.data.task import Splits
from nas.errors import NASError
from nas.randomness import generator
from nas.search import SearchConfig, find_method
from nas.spaces.darts.supernet import SupernetConfig
from pipeline.presets import find_preset

METHODS = ("darts", "pcdarts")
FORWARD, BACKWARD, STEP, SECOND_ORDER = "forward", "backward", "step", "second-order"
SEED = 0


class UnavailableError(NASError):
    """An implementation that cannot take part, and why; the others are measured without it."""


class DisagreementError(NASError):
    """An implementation that computes something else: its time means nothing."""


@dataclass(frozen=True)
class Setting:
    """One search step.

    Attributes:
        method: "darts" or "pcdarts".
        size: pixels a side of the square images.
        batch: images a batch, of either half of the data.
        supernet: its size.
        image_channels, classes: of the data.
        second_order: time DARTS's second-order architecture step, too.
    """

    method: str
    size: int
    batch: int
    supernet: SupernetConfig
    image_channels: int = 3
    classes: int = 10
    second_order: bool = False

    @property
    def shape(self) -> TaskShape:
        """Of the images."""
        return TaskShape(self.image_channels, self.size, self.size, self.classes)

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed, in the order of its memory needs."""
        return (FORWARD, BACKWARD, STEP, *([SECOND_ORDER] if self.second_order else []))

    @property
    def label(self) -> str:
        """For people."""
        name = {"darts": "DARTS", "pcdarts": "PC-DARTS"}[self.method]
        return (
            f"{name}, {self.size}×{self.size}, batch {self.batch}, "
            f"{self.supernet.channels} channels, {self.supernet.cells} cells"
        )

    @property
    def columns(self) -> dict[str, str | int]:
        """What tells this setting from others in a file of results."""
        return {
            "method": self.method,
            "size": self.size,
            "batch": self.batch,
            "channels": self.supernet.channels,
            "cells": self.supernet.cells,
        }

    def search_config(self) -> SearchConfig:
        """The paper's settings at this size."""
        paper = find_method(self.method).paper_config()
        return replace(paper, supernet=self.supernet, batch_size=self.batch)

    def task(self) -> ImageTask:
        """Noise with labels: a step costs the same whatever it learns from."""
        train = 4 * max(self.batch, self.classes)
        count = train + 2 * self.classes
        size = (count, self.image_channels, self.size, self.size)
        pixels = torch.randint(256, size, generator=generator(SEED, "benchmark")).byte()
        train_split, val, test = torch.arange(count).split([train, self.classes, self.classes])
        return ImageTask(
            name="noise",
            description="noise",
            images=TensorImages(pixels),
            labels=torch.arange(count) % self.classes,
            classes=tuple(str(label) for label in range(self.classes)),
            splits=Splits(train_split, val, test),
            mean=(0.5,) * self.image_channels,
            std=(0.29,) * self.image_channels,
            flip=False,
            examples=pixels[:1],
            digest="noise",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Setting:
        """What :meth:`to_json` gave."""
        return cls(**{**values, "supernet": SupernetConfig(**values["supernet"])})


def paper_setting(method: str, size: int, batch: int, *, second_order: bool) -> Setting:
    """The paper's supernet: 16 channels, 8 cells."""
    supernet = find_method(method).paper_config().supernet
    return Setting(method, size, batch, supernet, second_order=second_order and method == "darts")


def embedded_setting(method: str) -> Setting:
    """The search of ``make transfer``: the quick preset on 8x8 grey digits."""
    config = find_preset("quick").search(find_method(method))
    return Setting(
        method,
        8,
        config.batch_size,
        config.supernet,
        image_channels=1,
        second_order=method == "darts",
    )


def quick_setting(method: str) -> Setting:
    """Seconds: to see that everything works, not to compare."""
    supernet = replace(find_method(method).paper_config().supernet, channels=8, cells=3)
    return Setting(method, 8, 4, supernet, second_order=method == "darts")

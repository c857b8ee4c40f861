"""A small network and task, and their registration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import nn

from pipeline.registry import Registered, register
from pipeline.tracking import RunLog


class SmallNetwork(nn.Module):
    """Strided, normalised and with a training-only head, as the project's networks are."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, classes)
        self.auxiliary_head: nn.Module | None = nn.Linear(8, 10_000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.first(images)))
        return self.last(features.mean(dim=(2, 3)))


def make_network(channels: int, classes: int) -> SmallNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNetwork(channels, classes)
        network(torch.randn(64, channels, 8, 8) * 3 + 1)  # moves the running statistics
    return network.train()


def make_task(channels: int = 3, classes: tuple[str, ...] = ("ape", "bee", "cat")) -> Any:
    return SimpleNamespace(
        name="animals",
        description="Animals drawn for this test.",
        digest="0123456789abcdef" * 4,
        classes=classes,
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        shape=SimpleNamespace(channels=channels, height=9, width=8, classes=len(classes)),
        splits=SimpleNamespace(train=torch.arange(5), val=torch.arange(2), test=torch.arange(3)),
    )


def draw_images(
    count: int, channels: int = 3, size: tuple[int, int] = (9, 8), dtype: Any = np.uint8
) -> np.ndarray:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, *size, channels), dtype=np.uint8).astype(dtype)


def expected(network: nn.Module, task: Any, images: np.ndarray) -> np.ndarray:
    """The probabilities of images of the network's size, by numpy and the eager network."""
    pixels = (images.astype(np.float64) / 255 - task.mean) / task.std
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def add(log: RunLog, accuracy: float, said: list[str] | None = None, **options: Any) -> Registered:
    task = options.pop("task", None) or make_task()
    channels = task.shape.channels
    network = options.pop("network", None) or make_network(channels, len(task.classes))
    return register(
        log,
        options.pop("name", "animals-net"),
        network,
        task,
        step=options.pop("step", uuid4().hex),
        fresh=options.pop("fresh", False),
        sample=options.pop("sample", draw_images(4, channels)),
        description="A small network.",
        tags={"genotype_digest": "abc", "macs": 1234, "params": 56},
        validation_accuracy=accuracy,
        say=(said if said is not None else []).append,
    )

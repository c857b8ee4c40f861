"""What a network is worth and what it costs: accuracy, parameters, multiply-adds, latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import DataError

if TYPE_CHECKING:
    from nas.data.batches import Batch
    from nas.data.task import TaskShape


@dataclass(frozen=True)
class Evaluation:
    """How a network did on a set of images.

    Attributes:
        loss: mean cross-entropy an image, in nats.
        accuracy: share of images whose class has the largest logit, 0 to 1.
        predictions: int64 [N] on the CPU, in the order of the batches.
        labels: int64 [N] on the CPU.
    """

    loss: float
    accuracy: float
    predictions: Tensor
    labels: Tensor


def accuracy(network: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate ``network`` on ``batches``, which are on its device.

    Runs without gradients and in evaluation mode; the mode it was in comes back afterwards.

    Raises:
        DataError: there is no image.
    """
    loss = 0.0
    predictions: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluating(network):
        for batch in batches:
            logits = network(batch.images).float()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            predictions.append(logits.argmax(dim=1).cpu())
            labels.append(batch.labels.cpu())
    images = sum(map(len, labels))
    if images == 0:
        raise DataError("there are no images to evaluate on")
    predicted, true = torch.cat(predictions), torch.cat(labels)
    correct = (predicted == true).sum().item()
    return Evaluation(loss / images, correct / images, predicted, true)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back."""
    before = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(before)


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts int64 [classes, classes]: row is the true class, column the predicted one."""
    cells = labels * classes + predictions
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values, those of the ``auxiliary_head`` left out."""
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if not name.startswith("auxiliary_head.")
    )


def count_macs(network: nn.Module, shape: TaskShape) -> int:
    """Multiply-adds of one image of ``shape`` through ``network`` in evaluation mode.

    The convention: one multiplication with its addition counts as one, in convolutions and fully
    connected layers only. Biases, batch norms, pools, activations, sums and the auxiliary head
    count nothing. The pass runs on the meta device and computes nothing.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += output.numel() * layer.weight[0].numel()

    twin = copy.deepcopy(network).to("meta").eval()
    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    dtype = next(twin.parameters()).dtype
    images = torch.empty(1, shape.channels, shape.height, shape.width, dtype=dtype, device="meta")
    with torch.no_grad():
        twin(images)
    return total


def latency(
    network: nn.Module, shape: TaskShape, *, batch_size: int = 1, repeats: int = 20
) -> float:
    """Median seconds of one forward pass in evaluation mode, on the network's own device."""
    parameter = next(network.parameters())
    size = (batch_size, shape.channels, shape.height, shape.width)
    images = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
    seconds = []
    with evaluating(network):
        for _ in range(2 + repeats):
            start = time.perf_counter()
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first two warm up

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nas.architecture import Skeleton
from nas.data.task import TaskShape
from nas.errors import DataError
from nas.evaluation import (
    accuracy,
    confusion_matrix,
    count_macs,
    count_parameters,
    evaluating,
    latency,
)
from nas.randomness import generator
from nas.spaces.darts import PUBLISHED, DartsSpace

SHAPE = TaskShape(3, 7, 9, 5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.classifier = nn.Linear(8, 5)
        self.auxiliary_head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.depthwise(self.norm(self.conv(images))).mean((2, 3)))


def test_counts_by_hand():
    network = Small()
    assert count_parameters(network) == (27 * 8 + 8) + 16 + 9 * 8 + (8 * 5 + 5)
    # 7x9 becomes 4x5 with stride 2, then 2x3 without padding.
    assert count_macs(network, SHAPE) == 27 * 8 * 20 + 9 * 8 * 6 + 8 * 5


def test_counting_leaves_the_network_alone():
    network = Small().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, SHAPE)
    assert network.training
    assert not network.conv._forward_hooks
    for name, value in network.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_counting_computes_nothing():
    skeleton = Skeleton("imagenet", 1024, 14)  # 200 G multiply-adds and more than 1.8 G weights
    shape = TaskShape(3, 224, 224, 1000)
    architecture = DartsSpace().from_genotype(PUBLISHED["DARTS_V2"], skeleton)
    start = time.perf_counter()
    network = DartsSpace().meta_network(architecture, shape, auxiliary=False)
    assert count_macs(network, shape) > 200e9
    assert time.perf_counter() - start < 10


class Table(nn.Module):
    """Reads the logits out of the images, so that a test knows them."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return images


def batches(logits: Tensor, labels: Tensor, size: int) -> list[SimpleNamespace]:
    pairs = zip(logits.split(size), labels.split(size), strict=True)
    return [SimpleNamespace(images=images, labels=chosen) for images, chosen in pairs]


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, math.log(3.0)]])
    labels = torch.tensor([0, 1, 1])
    network = Table().train()
    result = accuracy(network, batches(logits, labels, 2))
    losses = [math.log(2), math.log(1 + math.exp(3)), math.log(4 / 3)]
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.predictions.tolist() == [0, 0, 1]
    assert result.predictions.dtype == torch.int64
    assert result.labels.tolist() == [0, 1, 1]
    assert network.training


def test_accuracy_does_not_depend_on_the_batch_size():
    draw = generator(0, "logits")
    logits = torch.randn(23, 4, generator=draw)
    labels = torch.randint(4, (23,), generator=draw)
    results = [accuracy(Table(), batches(logits, labels, size)) for size in (1, 5, 23)]
    for result in results:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.accuracy == (logits.argmax(1) == labels).sum().item() / 23
        assert torch.equal(result.predictions, results[0].predictions)


def test_the_mode_comes_back_after_an_error():
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("broken")

    network = Failing().train()
    with pytest.raises(ValueError, match="broken"):
        accuracy(network, batches(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), 2))
    assert network.training
    assert torch.is_grad_enabled()


def test_accuracy_needs_images():
    with pytest.raises(DataError, match="no images"):
        accuracy(Table(), [])


def test_confusion_matrix_has_true_classes_in_rows():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    predictions = torch.tensor([0, 1, 1, 0, 0, 2])
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion_matrix(labels, predictions, 4).tolist() == expected


def test_latency_grows_with_the_work():
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            assert images.shape == (4, 3, 7, 9)
            assert not self.training
            time.sleep(0.01)
            return images

    network = Slow().train()
    assert 0.01 <= latency(network, SHAPE, batch_size=4, repeats=5) < 0.1
    assert network.training


def test_evaluating_restores_the_mode() -> None:
    module = nn.Dropout()
    for mode in (True, False):
        module.train(mode)
        with evaluating(module):
            assert not module.training
            assert not torch.is_grad_enabled()
        assert module.training == mode
    with pytest.raises(ValueError, match="x"), evaluating(module.train()):
        raise ValueError("x")
    assert module.training
    assert torch.is_grad_enabled()

from __future__ import annotations

import pytest

from nas.architecture import Skeleton
from nas.data.task import TaskShape
from nas.errors import ArchitectureError, ConfigurationError
from nas.evaluation import count_macs
from nas.spaces.darts import PUBLISHED, DartsSpace
from nas.transfer import parse_macs, restack

SPACE = DartsSpace()
SOURCE = SPACE.from_genotype(PUBLISHED["DARTS_V2"], Skeleton("cifar", 16, 8))
SMALL = TaskShape(1, 28, 28, 10)
LARGE = TaskShape(3, 224, 224, 1000)


def macs(skeleton: Skeleton, shape: TaskShape) -> int:
    architecture = SOURCE.with_skeleton(skeleton)
    return count_macs(SPACE.meta_network(architecture, shape, auxiliary=False), shape)


def test_numbers_are_used_as_they_are():
    moved = restack(SOURCE, SMALL, channels=36, cells=20)
    assert moved.skeleton == Skeleton("cifar", 36, 20)
    assert moved.decisions == SOURCE.decisions


def test_without_numbers_the_architecture_keeps_its_own():
    assert restack(SOURCE, SMALL) == SOURCE


def test_the_stem_follows_the_shorter_side_unless_it_is_given():
    def stem(height, width, **options):
        shape = TaskShape(3, height, width, 10)
        return restack(SOURCE, shape, **options).skeleton.stem

    assert stem(128, 128) == "imagenet"
    assert stem(127, 300) == "cifar"
    assert stem(127, 127, stem="imagenet") == "imagenet"
    assert stem(224, 224, stem="cifar") == "cifar"


def test_a_limit_agrees_with_trying_every_width():
    shape = TaskShape(1, 8, 8, 10)
    costs = {width: macs(Skeleton("cifar", width, 1), shape) for width in range(2, 19, 2)}
    for limit in (costs[2], costs[10] - 1, (costs[14] + costs[16]) // 2):
        expected = max(width for width, cost in costs.items() if cost <= limit)
        moved = restack(SOURCE, shape, cells=1, max_macs=limit)
        assert moved.skeleton == Skeleton("cifar", expected, 1)


def test_the_mobile_setting_brackets_600_million():
    moved = restack(SOURCE, LARGE, cells=14, max_macs=parse_macs("600M"))
    width = moved.skeleton.channels
    assert moved.skeleton == Skeleton("imagenet", width, 14)
    assert macs(Skeleton("imagenet", width, 14), LARGE) <= 600_000_000
    assert macs(Skeleton("imagenet", width + 2, 14), LARGE) > 600_000_000


def test_a_limit_that_nothing_keeps_names_both_numbers():
    shape = TaskShape(1, 8, 8, 10)
    smallest = macs(Skeleton("cifar", 2, 3), shape)
    with pytest.raises(ArchitectureError, match=f"{smallest}.*limit of {smallest - 1}"):
        restack(SOURCE, shape, cells=3, max_macs=smallest - 1)


def test_channels_and_a_limit_exclude_each_other():
    with pytest.raises(ConfigurationError, match="not both"):
        restack(SOURCE, SMALL, channels=16, max_macs=10**6)


def test_an_impossible_skeleton_is_refused():
    with pytest.raises(ArchitectureError, match="not 17"):
        restack(SOURCE, SMALL, channels=17)
    with pytest.raises(ArchitectureError, match="at least 1"):
        restack(SOURCE, SMALL, cells=0)
    with pytest.raises(ArchitectureError, match="at least 1"):
        restack(SOURCE, SMALL, channels=0)
    with pytest.raises(ArchitectureError, match="'resnet'"):
        restack(SOURCE, SMALL, stem="resnet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600M", 600_000_000),
        (" 1.5G ", 1_500_000_000),
        ("250k", 250_000),
        ("600 m", 600_000_000),
        ("12345", 12_345),
        ("0.5k", 500),
    ],
)
def test_parse_macs(text, expected):
    assert parse_macs(text) == expected


@pytest.mark.parametrize(
    "text", ["", "M", "-5M", "0", "0.0001", "1e9", "600T", "nan", "60 0M", "٣M"]
)
def test_parse_macs_refuses(text):
    with pytest.raises(ConfigurationError, match="600M"):
        parse_macs(text)

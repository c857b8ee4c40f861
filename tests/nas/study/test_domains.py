"""Halves of families: no image and no class on both sides, changed as asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nas.data.task import RawSet
from nas.errors import UnknownNameError
from nas.study.domains import (
    EVEN,
    INVERTED,
    ODD,
    TURNED,
    Domain,
    Domains,
    Families,
    half_of,
    without_repeats,
)
from nas.transfer.zoo import overlap


def raw(images: torch.Tensor, labels: list[int]) -> RawSet:
    names = tuple(f"class {label}" for label in range(max(labels) + 1))
    return RawSet(images, torch.tensor(labels), names, "made up", False)


def test_of_repeated_images_the_first_stays() -> None:
    images = torch.tensor([3, 1, 3, 2, 1], dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 3, 2, 2)
    kept = without_repeats(raw(images.contiguous(), [0, 1, 1, 0, 1]))
    assert isinstance(kept.images, torch.Tensor)
    assert kept.images[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert kept.labels.tolist() == [0, 1, 0]


def test_halves_by_class() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    whole = raw(images, [0, 1, 2, 3, 4, 1])
    odd = half_of(whole, Domain("animals", ODD))
    assert isinstance(odd.images, torch.Tensor)
    assert odd.images.flatten().tolist() == [1, 3, 5]
    assert odd.labels.tolist() == [0, 1, 0]
    assert odd.classes == ("class 1", "class 3")
    assert half_of(whole, Domain("animals", EVEN)).classes == ("class 0", "class 2", "class 4")


def test_changes() -> None:
    images = torch.tensor([[0, 10], [20, 255]], dtype=torch.uint8).view(1, 1, 2, 2)
    whole = raw(images, [0])
    inverted = half_of(whole, Domain("animals", EVEN, INVERTED)).images
    turned = half_of(whole, Domain("animals", EVEN, TURNED)).images
    assert inverted[0][0].tolist() == [[255, 245], [235, 0]]
    assert turned[0][0].tolist() == [[10, 255], [0, 20]]


def test_real_halves_share_nothing(tmp_path: Path) -> None:
    domains = Domains(Families(tmp_path), side=8, limit=120, test_fraction=0.4)
    even, odd = (domains[Domain("digits", half)] for half in (EVEN, ODD))
    assert even.task.classes == ("0", "2", "4", "6", "8")
    assert overlap(even.hashes, odd.hashes) == 0
    assert len(even.task.labels) == 120
    assert 40 <= len(even.task.splits.test) <= 50  # 0.4 of them, rounded class by class


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("digit", EVEN), "unknown family of images 'digit': did you mean 'digits'"),
        (("digits", "evn"), "unknown half of the classes 'evn'"),
        (("digits", EVEN, "turn"), "unknown change of the images 'turn'"),
    ],
)
def test_unknown_names(wrong: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        Domain(*wrong)

"""Splits: deterministic, stratified, disjoint, free of leaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.data import ImageTask, halves
from nas.data.splits import (
    balanced_subset,
    duplicate_groups,
    make_splits,
    rank_within_class,
    shared_between,
)
from nas.data.task import Splits
from nas.errors import ConfigurationError, DataError
from nas.randomness import generator

CLASSES = ("ant", "bee")


def _split(labels: torch.Tensor, groups: torch.Tensor | None = None, **options: object) -> Splits:
    settled = {"given": {}, "val_fraction": None, "test_fraction": 0.2, "seed": 0, **options}
    groups = torch.arange(len(labels)) if groups is None else groups
    return make_splits(labels, groups, classes=CLASSES, **settled)  # type: ignore[arg-type]


def _counts(labels: torch.Tensor, numbers: torch.Tensor) -> list[int]:
    return torch.bincount(labels[numbers], minlength=2).tolist()


def test_counts_of_each_class_are_the_stated_fractions() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50)
    splits = _split(labels)
    assert _counts(labels, splits.test) == [20, 10]  # 20 % of all
    assert _counts(labels, splits.val) == [16, 8]  # 20 % of the rest
    assert _counts(labels, splits.train) == [64, 32]


def test_a_given_test_split_is_kept_and_validation_is_a_tenth_of_train() -> None:
    labels = torch.tensor([0, 1] * 60)
    official = {"train": torch.arange(100), "test": torch.arange(100, 120)}
    splits = _split(labels, given=official)
    assert torch.equal(splits.test, official["test"])
    assert _counts(labels, splits.val) == [5, 5]
    assert torch.equal(torch.cat([splits.train, splits.val]).sort().values, official["train"])


def test_given_train_and_val_leave_test_to_be_cut_from_train() -> None:
    labels = torch.tensor([0, 1] * 60)
    splits = _split(labels, given={"train": torch.arange(100), "val": torch.arange(100, 120)})
    assert torch.equal(splits.val, torch.arange(100, 120))
    assert _counts(labels, splits.test) == [10, 10]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=12, max_size=40),  # images in each group
    seed=st.integers(0, 1000),
    fraction=st.floats(0.05, 0.6),
)
def test_any_set_is_partitioned_and_identical_images_stay_together(
    sizes: list[int], seed: int, fraction: float
) -> None:
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator(seed, "shuffle"))]
    labels = groups % 2
    splits = _split(labels, groups, test_fraction=fraction, val_fraction=fraction, seed=seed)
    parts = (splits.train, splits.val, splits.test)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(groups)))
    assert all(torch.equal(part, part.sort().values) for part in parts)
    held = [len(groups[part].unique()) for part in parts]
    assert sum(held) == len(sizes)  # no group is counted twice
    assert all(min(_counts(labels, part)) >= 1 for part in parts)
    again = _split(labels, groups, test_fraction=fraction, val_fraction=fraction, seed=seed)
    assert torch.equal(again.test, splits.test)
    assert torch.equal(again.val, splits.val)


def test_the_seed_decides() -> None:
    labels = torch.tensor([0, 1] * 60)
    assert torch.equal(_split(labels, seed=1).test, _split(labels, seed=1).test)
    assert not torch.equal(_split(labels, seed=1).test, _split(labels, seed=2).test)


def test_a_class_with_too_few_different_images_is_named() -> None:
    labels = torch.tensor([0] * 20 + [1] * 4)
    groups = torch.tensor([*range(20), 20, 20, 21, 21])  # "bee" has two different images
    with pytest.raises(DataError, match=r"class 'bee' has 2 different image.* train, val, test"):
        _split(labels, groups)


def test_a_class_missing_from_a_given_split_is_named_with_its_counts() -> None:
    labels = torch.tensor([0, 1] * 10 + [0, 0])
    official = {"train": torch.arange(20), "test": torch.tensor([20, 21])}
    with pytest.raises(DataError, match=r"class 'bee' lacks images \(train 9, val 1, test 0\)"):
        _split(labels, given=official)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="test_fraction is"):
        _split(torch.tensor([0, 1] * 10), test_fraction=fraction)
    with pytest.raises(ConfigurationError, match="val_fraction is"):
        _split(torch.tensor([0, 1] * 10), val_fraction=fraction)


def test_rank_within_class_against_a_loop() -> None:
    labels = torch.randint(0, 5, (200,), generator=generator(0, "labels"))
    order = torch.randperm(200, generator=generator(0, "order"))
    seen: dict[int, int] = {}
    expected = torch.empty(200, dtype=torch.int64)
    for image in order.tolist():
        label = int(labels[image])
        expected[image] = seen.get(label, 0)
        seen[label] = seen.get(label, 0) + 1
    assert torch.equal(rank_within_class(labels, order), expected)


def test_a_balanced_subset_takes_evenly_and_all_of_the_small_classes() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    chosen = balanced_subset(labels, 23, generator(0, "subset"))
    assert torch.bincount(labels[chosen]).tolist() == [10, 3, 10]
    assert torch.equal(chosen, chosen.sort().values)
    assert len(balanced_subset(labels, 1000, generator(0, "subset"))) == 153


def test_animals_has_duplicates_and_none_crosses_a_split(animals: ImageTask) -> None:
    groups = duplicate_groups(animals.images.fingerprints())
    assert len(groups) - len(groups.unique()) == 284
    assert shared_between(groups, animals.splits) == 0
    # independent of our hashes: the pixels themselves
    flat = animals.images.gather(torch.arange(10_000)).flatten(1)
    test = {bytes(row.tolist()) for row in flat[animals.splits.test]}
    searched = torch.cat([animals.splits.train, animals.splits.val])
    assert not test & {bytes(row.tolist()) for row in flat[searched]}


def test_shared_images_between_given_splits_are_counted() -> None:
    groups = torch.tensor([0, 1, 2, 1, 0, 3])
    splits = Splits(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5]))
    assert shared_between(groups, splits) == 2


def test_halves_are_disjoint_stratified_and_without_test_images(animals: ImageTask) -> None:
    weights, alphas = halves(animals, seed=0)
    pool = torch.cat([animals.splits.train, animals.splits.val]).sort().values
    assert torch.equal(torch.cat([weights, alphas]).sort().values, pool)
    counts = torch.bincount(animals.labels[weights]) - torch.bincount(animals.labels[alphas])
    assert int(counts.abs().max()) <= 2
    groups = duplicate_groups(animals.images.fingerprints())
    assert not torch.isin(groups[alphas], groups[weights]).any()
    assert not torch.equal(halves(animals, seed=1)[0], weights)

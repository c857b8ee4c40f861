"""Deterministic, stratified, disjoint splits in which identical images stay together.

A cut works on groups of byte-identical images, not on images: a picture that occurs twice never
stands on both sides, so the test split holds nothing a network was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nas.data.task import ImageTask, SplitName, Splits
from nas.errors import ConfigurationError, DataError
from nas.randomness import generator

TEST_FRACTION = 0.2  # of all images
VAL_FRACTION = 0.2  # of what the test split leaves
VAL_FRACTION_OFFICIAL = 0.1  # of the training images, where the test split is given


def duplicate_groups(fingerprints: Sequence[bytes]) -> Tensor:
    """Group number of each image, int64 [N]: equal exactly where the fingerprints are equal."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(f, len(numbers)) for f in fingerprints])


def rank_within_class(labels: Tensor, order: Tensor) -> Tensor:
    """How many images of the same class stand before each image in ``order``, int64 [N].

    ``order`` is a permutation of the N images; the result is indexed by image.
    """
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    ranks = torch.empty_like(order)
    ranks[by_class] = torch.arange(len(order)) - starts
    return ranks


def balanced_subset(labels: Tensor, limit: int, rng: torch.Generator) -> Tensor:
    """At most ``limit`` image numbers, sorted, as many of each class as the smallest ones allow."""
    order = torch.randperm(len(labels), generator=rng)
    ranks = rank_within_class(labels, order)
    return order[torch.argsort(ranks[order], stable=True)][:limit].sort().values


def cut(
    pool: Tensor,
    labels: Tensor,
    groups: Tensor,
    fraction: float,
    rng: torch.Generator,
    *,
    classes: Sequence[str],
    parts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Cut about ``fraction`` of each class off ``pool``: (what remains, what was cut), both sorted.

    ``labels`` and ``groups`` are those of the whole set, int64 [N]; ``pool`` holds image numbers.
    ``parts`` names what the pool must still yield, the part cut now last: every class keeps a
    group of identical images for each of the others. Raises DataError for a class with too few.
    """
    ids, members = torch.unique(groups[pool], return_inverse=True)  # groups present in the pool
    sizes = torch.bincount(members)
    first = torch.full_like(ids, len(pool)).scatter_reduce(
        0, members, torch.arange(len(pool)), "amin"
    )
    group_labels = labels[pool[first]]  # should two labels share a picture, the first counts
    order = torch.randperm(len(ids), generator=rng)
    by_class = order[torch.argsort(group_labels[order], stable=True)]
    per_class = torch.bincount(group_labels, minlength=len(classes))

    taken = torch.zeros(len(ids), dtype=torch.bool)
    for name, mine in zip(classes, by_class.split(per_class.tolist()), strict=True):
        if len(mine) < len(parts):
            raise DataError(
                f"class '{name}' has {len(mine)} different image(s), but "
                f"{', '.join(parts)} need at least one each: add images or leave the class out"
            )
        seen = sizes[mine].cumsum(0)  # images in the groups up to and with this one
        wanted = max(1, round(int(seen[-1]) * fraction))
        enough = int((seen < wanted).sum()) + 1
        taken[mine[: min(enough, len(mine) - len(parts) + 1)]] = True
    chosen = taken[members]
    return pool[~chosen], pool[chosen]


def make_splits(
    labels: Tensor,
    groups: Tensor,
    *,
    classes: Sequence[str],
    given: dict[SplitName, Tensor],
    val_fraction: float | None,
    test_fraction: float,
    seed: int,
) -> Splits:
    """Splits of a set: those ``given``, and what is missing cut from the training images.

    ``given`` is empty, or holds "train" and perhaps "val" and "test". A fraction is of the images
    that are left at that point; ``val_fraction=None`` is VAL_FRACTION, or VAL_FRACTION_OFFICIAL
    where the test split is given. A function of (labels, groups, fractions, seed) alone.
    Raises ConfigurationError for a fraction outside (0, 1), DataError for a class without an
    image in each split.
    """
    if val_fraction is None:
        val_fraction = VAL_FRACTION_OFFICIAL if "test" in given else VAL_FRACTION
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ConfigurationError(f"{name} is {fraction}: it must lie between 0 and 1")
    train = given["train"].sort().values if given else torch.arange(len(labels))
    parts = {name: numbers.sort().values for name, numbers in given.items()}
    if "test" not in parts:
        needed = ["train", "test"] if "val" in parts else ["train", "val", "test"]
        train, parts["test"] = cut(
            train, labels, groups, test_fraction, generator(seed, "split", "test"),
            classes=classes, parts=needed,
        )  # fmt: skip
    if "val" not in parts:
        train, parts["val"] = cut(
            train, labels, groups, val_fraction, generator(seed, "split", "val"),
            classes=classes, parts=["train", "val"],
        )  # fmt: skip
    splits = Splits(train, parts["val"], parts["test"])
    _require_every_class(labels, splits, classes)
    return splits


def limit_splits(
    splits: Splits, labels: Tensor, limit: int, classes: int, seed: int
) -> tuple[Tensor, Splits]:
    """``limit`` images at most, each split shrunk in proportion and even over the classes.

    Returns the images kept, as sorted numbers, and the splits among them. Raises DataError where
    the limit leaves a split fewer images than there are classes.
    """
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    total = sum(len(numbers) for numbers in parts.values())
    quotas = {name: max(classes, limit * len(n) // total) for name, n in parts.items()}
    quotas["train"] = limit - quotas["val"] - quotas["test"]
    if quotas["train"] < classes:
        raise DataError(
            f"a limit of {limit} images cannot give each of {classes} classes one in every split: "
            f"at least {3 * classes} are needed"
        )
    chosen = {
        name: numbers[
            balanced_subset(labels[numbers], quotas[name], generator(seed, "limit", name))
        ]
        for name, numbers in parts.items()
    }
    kept = torch.cat(list(chosen.values())).sort().values
    among = {name: torch.searchsorted(kept, n.sort().values) for name, n in chosen.items()}
    return kept, Splits(**among)


def _require_every_class(labels: Tensor, splits: Splits, classes: Sequence[str]) -> None:
    counts = {
        name: torch.bincount(labels[numbers], minlength=len(classes))
        for name, numbers in (("train", splits.train), ("val", splits.val), ("test", splits.test))
    }
    for label, name in enumerate(classes):
        held = {split: int(count[label]) for split, count in counts.items()}
        if min(held.values()) == 0:
            listed = ", ".join(f"{split} {count}" for split, count in held.items())
            raise DataError(
                f"class '{name}' lacks images ({listed}): each split needs at least one"
            )


def shared_between(groups: Tensor, splits: Splits) -> int:
    """How many validation and test images are identical to an image of an earlier split."""
    in_train = torch.isin(groups[splits.val], groups[splits.train]).sum()
    search = torch.cat([splits.train, splits.val])
    in_search = torch.isin(groups[splits.test], groups[search]).sum()
    return int(in_train + in_search)


def halves(task: ImageTask, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified halves of train and validation for a bilevel search, never of the test split.

    The first is for the weights, the second for the architecture parameters (DARTS, section 3);
    both int64, sorted, disjoint. Raises DataError for a class with a single image.
    """
    pool = torch.cat([task.splits.train, task.splits.val]).sort().values
    groups = duplicate_groups(task.images.fingerprints())
    return cut(
        pool, task.labels, groups, 0.5, generator(seed, "halves"),
        classes=task.classes, parts=["weights half", "architecture half"],
    )  # fmt: skip

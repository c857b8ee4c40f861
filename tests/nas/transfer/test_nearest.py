"""Which supernet is taken: the nearest, never the target itself or what overlaps it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo_entries import make_entry

from nas.data import ImageTask, TensorImages, load_task
from nas.data.splits import Splits
from nas.errors import ConfigurationError
from nas.transfer.nearest import Standing, Target, appraise, rank
from nas.transfer.otdd import DatasetSketch, describe, pixels
from nas.transfer.zoo import image_hashes


def view(task: ImageTask) -> Target:
    return Target(task.name, task.digest, image_hashes(task), describe(task, pixels(8), 0))


def sketch(task: ImageTask) -> DatasetSketch:
    return describe(task, pixels(8), 0)


@pytest.fixture(scope="module")
def halves_of_mnist(tmp_path_factory: pytest.TempPathFactory) -> list[ImageTask]:
    """Two sets of 200 digits each, of the same origin, without a shared image."""
    whole = load_task("mnist5k", root=tmp_path_factory.mktemp("unused"), limit=400, image_size=8)
    numbers, pool = torch.arange(200), torch.arange(150)
    parts = []
    for half in (0, 1):
        chosen = torch.arange(half, 400, 2)
        parts.append(
            replace(
                whole,
                name=f"mnist-{half}",
                digest=str(half) * 64,
                images=whole.images.subset(chosen),
                labels=whole.labels[chosen],
                splits=Splits(pool, numbers[150:175], numbers[175:]),
            )
        )
    return parts


@pytest.fixture(scope="module")
def mnist(halves_of_mnist: list[ImageTask]) -> ImageTask:
    return halves_of_mnist[0]


def standing_of(source: ImageTask, target: ImageTask) -> Standing:
    entry = make_entry(source)
    return appraise(source.name, entry.card, entry.hashes, [sketch(source)], view(target))


def test_the_known_nearest_is_ranked_first(
    few_digits: ImageTask, animals: ImageTask, halves_of_mnist: list[ImageTask]
) -> None:
    target, like_it = halves_of_mnist
    ranked = rank([standing_of(task, target) for task in (animals, like_it, few_digits)])
    assert ranked[0].name == "mnist-1"
    assert ranked[0].distance < 0.8 * ranked[1].distance
    assert [standing.refused for standing in ranked] == ["", "", ""]


class TestNeverTaken:
    def test_the_target_itself(self, few_digits: ImageTask, animals: ImageTask) -> None:
        own, other = standing_of(few_digits, few_digits), standing_of(animals, few_digits)
        assert own.refused == "searched on the target itself"
        assert own.distance < other.distance
        assert [s.name for s in rank([own, other])] == ["animals", "digits"]

    def test_the_target_at_another_limit(self, few_digits: ImageTask, tmp_path: Path) -> None:
        fewer = load_task("digits", root=tmp_path, limit=100)
        assert fewer.digest != few_digits.digest
        assert standing_of(fewer, few_digits).refused == "searched on the target itself"

    def test_the_target_among_several_sources(
        self, few_digits: ImageTask, animals: ImageTask
    ) -> None:
        entry = make_entry(animals, few_digits)
        standing = appraise("both", entry.card, entry.hashes, [], view(few_digits))
        assert standing.refused == "searched on the target itself"

    @pytest.mark.parametrize(("shared", "taken"), [(0, True), (2, True), (3, False), (60, False)])
    def test_a_set_that_shares_images(
        self, shared: int, taken: bool, few_digits: ImageTask, animals: ImageTask
    ) -> None:
        """One in a hundred of 200 different images may be shared, and no more."""
        pixels_ = animals.images.gather(torch.arange(200)).clone()
        pixels_[:shared] = few_digits.images.gather(torch.arange(shared))
        mixed = replace(animals, name="mixed", images=TensorImages(pixels_), digest="d" * 64)
        standing = standing_of(mixed, few_digits)
        assert standing.overlap == pytest.approx(shared / 200)
        assert (standing.refused == "") == taken
        if not taken:
            assert f"was searched on {shared / 200:.1%} of the target's images" in standing.refused


class TestRank:
    def test_of_several_sources_the_nearest_counts(
        self, animals: ImageTask, halves_of_mnist: list[ImageTask]
    ) -> None:
        target, like_it = halves_of_mnist
        alone = standing_of(like_it, target)
        entry = make_entry(like_it, animals)
        sketches = [sketch(like_it), sketch(animals)]
        both = appraise("both", entry.card, entry.hashes, sketches, view(target))
        assert both.distance == alone.distance
        assert [s.name for s in rank([alone, both])] == ["both", "mnist-1"]

    def test_without_a_sketch_it_is_taken_last(self, few_digits: ImageTask) -> None:
        far = Standing("far", ("a",), 9.0, 0.0, "")
        entry = make_entry(few_digits)
        target = replace(view(few_digits), name="new", digest="0", hashes=torch.tensor([1]))
        unknown = appraise("unknown", entry.card, entry.hashes, [], target)
        assert math.isinf(unknown.distance)
        assert [s.name for s in rank([unknown, far])] == ["far", "unknown"]

    def test_a_sketch_of_another_embedding_gives_no_distance(
        self, few_digits: ImageTask, mnist: ImageTask
    ) -> None:
        entry = make_entry(few_digits)
        other = describe(few_digits, pixels(4), 0)
        standing = appraise("digits", entry.card, entry.hashes, [other], view(mnist))
        assert math.isinf(standing.distance)

    def test_any_measure_can_be_plugged_in(
        self, few_digits: ImageTask, animals: ImageTask, mnist: ImageTask
    ) -> None:
        def measure(a: DatasetSketch, b: DatasetSketch) -> float:
            if b.name != "mnist-0":
                raise ConfigurationError("the target comes second")
            return float(a.name == "digits")

        standings = []
        for task in (few_digits, animals):
            entry = make_entry(task)
            args = (task.name, entry.card, entry.hashes, [sketch(task)], view(mnist), measure)
            standings.append(appraise(*args))
        assert [s.name for s in rank(standings)] == ["animals", "digits"]


def test_splits_play_no_part(few_digits: ImageTask) -> None:
    """Images of the test split count as much as others."""
    splits = Splits(*(few_digits.splits.test, few_digits.splits.val, few_digits.splits.train))
    assert torch.equal(image_hashes(few_digits), image_hashes(replace(few_digits, splits=splits)))

"""One supernet for several data sets: whose turn it is, whose head it is, and resuming."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from searches import SUPERNETS, KilledError, Killer, Listener, exact, make_search, outcome

import nas.loop
from nas.data import ImageTask, TensorImages, load_task
from nas.errors import ConfigurationError, UnknownNameError
from nas.search import BilevelSearch, SearchConfig, find_method
from nas.search.sources import joint_shape

CPU = torch.device("cpu")
DIGITS, LETTERS = slice(0, 10), slice(10, 20)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    """100 larger digits, dyed: three channels, ten classes of its own."""
    task = load_task("mnist5k", root=tmp_path_factory.mktemp("unused"), limit=100, image_size=12)
    pixels = task.images.gather(torch.arange(len(task.labels))).expand(-1, 3, -1, -1).clone()
    pixels[:, 1] //= 2
    return replace(
        task, images=TensorImages(pixels), mean=task.mean * 3, std=task.std * 3, digest="c" * 64
    )


def joint(
    *tasks: ImageTask, method: str = "darts", sampling: str = "sqrt", **settings: object
) -> BilevelSearch:
    values: dict[str, object] = {
        "supernet": SUPERNETS[method],
        "epochs": 2,
        "batch_size": 25,
        "crop_padding": 1,
        "learning_rate": 0.1,
        "architecture_learning_rate": 0.01,
    }
    config = SearchConfig(**(values | settings))  # type: ignore[arg-type]
    return BilevelSearch(tasks, find_method(method), config, seed=0, device=CPU, sampling=sampling)


def test_one_source_is_an_ordinary_search(few_digits: ImageTask) -> None:
    alone = joint(few_digits, batch_size=40).run()
    assert outcome(alone) == outcome(make_search(few_digits).run())
    assert not [name for name in alone.records[0].metrics if name.startswith("source/")]


def test_the_supernet_has_the_classes_of_all_and_the_largest_images(
    few_digits: ImageTask, coloured: ImageTask
) -> None:
    shape = joint(few_digits, coloured).supernet.shape
    assert (shape.channels, shape.height, shape.width, shape.classes) == (3, 12, 12, 20)


def test_a_step_has_both_batches_of_one_source_with_its_head(
    few_digits: ImageTask, coloured: ImageTask
) -> None:
    search = joint(few_digits, coloured, sampling="uniform")
    turns = []
    for train, validation in search.batches():
        assert train.head == validation.head
        assert train.images.shape[1] == validation.images.shape[1] == 3
        side = 8 if train.head == DIGITS else 12
        assert train.images.shape[2:] == (side, side)
        if train.head == DIGITS:  # grey, three times
            assert torch.equal(train.images[:, 0], train.images[:, 2])
        turns.append(train.head.start)
    assert len(turns) == search.steps == sum(source.steps for source in search.sources.each)
    assert set(turns) == {0, 10}


@pytest.mark.parametrize(("sampling", "share"), [("sqrt", 0.5858), ("uniform", 0.5)])
def test_sources_are_drawn_by_their_size(
    sampling: str, share: float, few_digits: ImageTask, coloured: ImageTask
) -> None:
    """160 and 80 images that are not of the test split: 2 ** 0.5 to 1, or 1 to 1."""
    search = joint(few_digits, coloured, sampling=sampling)
    images = [source.images for source in search.sources.each]
    expected = images[0] ** 0.5 / sum(n**0.5 for n in images) if sampling == "sqrt" else 0.5
    assert expected == pytest.approx(share, abs=0.02)
    drawn = Counter(turn for epoch in range(600) for turn in search.sources._turns(epoch))
    count = sum(drawn.values())
    deviation = (expected * (1 - expected) / count) ** 0.5
    assert drawn[0] / count == pytest.approx(expected, abs=4 * deviation)


def test_every_source_goes_on_where_it_was(few_digits: ImageTask, coloured: ImageTask) -> None:
    """Over epochs, each source sees pass after pass of its own batches, none twice."""
    search = joint(few_digits, coloured)
    seen = []
    for epoch in range(4):
        for train, _ in search.sources.pairs(epoch, 0):
            if train.head == LETTERS:
                seen.append(train)
    alone = search.sources.each[1].pairs(0)
    for batch, (expected, _) in zip(seen, alone, strict=False):
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.images, expected.images)
    assert len(seen) > 2


def test_a_source_leaves_the_heads_of_others_alone(
    few_digits: ImageTask, coloured: ImageTask
) -> None:
    search = joint(few_digits, coloured, weight_decay=0.0)
    train, _ = next(pair for pair in search.batches() if pair[0].head == LETTERS)
    before = {n: t.clone() for n, t in search.supernet.groups().classifier.items()}
    trunk = exact(search.supernet.weights)
    search.weight_step(train)
    for name, tensor in search.supernet.groups().classifier.items():
        assert torch.equal(tensor[..., DIGITS], before[name][..., DIGITS])
        assert not torch.equal(tensor[..., LETTERS], before[name][..., LETTERS])
    assert exact(search.supernet.weights) != trunk


def test_accuracies_of_each_and_their_mean(few_digits: ImageTask, coloured: ImageTask) -> None:
    listener = Listener()
    result = joint(few_digits, coloured).run(None, listener)
    for record in result.records:
        own = [record.metrics[f"source/{name}/val_accuracy"] for name in ("digits", "mnist5k")]
        assert record.metrics["supernet/val_accuracy"] == pytest.approx(sum(own) / 2)
    first = [(event.batch, event.batches) for event in listener.validations if event.epoch == 0]
    assert [batch for batch, _ in first] == list(range(1, len(first) + 1))
    assert {batches for _, batches in first} == {len(first)}


@pytest.mark.parametrize("method", ["darts", "darts-2nd", "pcdarts"])
def test_killed_and_resumed_ends_with_the_same_bits(
    method: str,
    few_digits: ImageTask,
    coloured: ImageTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)
    undisturbed = outcome(joint(few_digits, coloured, method=method).run())
    steps = joint(few_digits, coloured).steps
    for kill in (steps + 2, 1):
        with pytest.raises(KilledError):
            joint(few_digits, coloured, method=method).run(tmp_path / "c", Killer(kill))
    resumed = joint(few_digits, coloured, method=method).run(tmp_path / "c")
    assert outcome(resumed) == undisturbed


class TestRefused:
    def test_the_same_set_twice(self, few_digits: ImageTask) -> None:
        with pytest.raises(ConfigurationError, match="not on digits, digits"):
            joint_shape([few_digits, few_digits])

    def test_no_set(self) -> None:
        with pytest.raises(ConfigurationError, match="not on none"):
            joint_shape([])

    def test_channels_that_do_not_go_together(
        self, few_digits: ImageTask, coloured: ImageTask
    ) -> None:
        pixels = few_digits.images.gather(torch.arange(200)).expand(-1, 2, -1, -1)
        two = replace(few_digits, images=TensorImages(pixels), digest="2" * 64)
        with pytest.raises(ConfigurationError, match=r"'digits' have 2 channels, .* other .* 3"):
            joint_shape([two, coloured])

    def test_sampling(self, few_digits: ImageTask) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
            joint(few_digits, sampling="uniforms")

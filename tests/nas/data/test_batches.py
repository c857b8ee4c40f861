"""Batches are what they say, and the same whenever and in whatever part they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device_copies import META, DeviceCopies
from torchvision.transforms.v2 import functional as torchvision

from nas.data import Augmentation, Batch, Batches, ImageTask, batches, files, load_task
from nas.data.files import FileImages
from nas.errors import ConfigurationError, DataError
from nas.randomness import generator

EVERYTHING = Augmentation(
    random_resized_crop=True, crop_padding=2, flip=True, color_jitter=0.3, cutout=3
)


@pytest.fixture
def streamed(
    write_digits: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ImageTask:
    """45 real digits, 40 pixels a side, colour, that stay in their files and are seen at 16."""
    monkeypatch.setattr(files, "RESIDENT_BYTES", 0)
    folder = write_digits(tmp_path / "streamed", 15, side=40, mode="RGB")
    task = load_task(f"folder:{folder}", root=tmp_path, image_size=16)
    assert isinstance(task.images, FileImages)
    return task


def _batches(task: ImageTask, batch_size: int = 32, **options: object) -> Batches:
    settled = {"seed": 0, "stream": "test", **options}
    return Batches(task, task.splits.train, batch_size, **settled)  # type: ignore[arg-type]


def _same(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        for one, other in zip(ones, others, strict=True)
    )


def test_plain_batches_are_the_normalised_images_in_order(digits: ImageTask) -> None:
    batches = list(_batches(digits).epoch())
    images = torch.cat([batch.images for batch in batches])
    expected = digits.images.gather(digits.splits.train).float() / 255
    expected = (expected - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images, expected)
    assert torch.equal(torch.cat([b.labels for b in batches]), digits.labels[digits.splits.train])
    assert abs(float(images.mean())) < 1e-4
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_types_and_layout(streamed: ImageTask, digits: ImageTask) -> None:
    for task, shape in ((streamed, (8, 3, 16, 16)), (digits, (8, 1, 8, 8))):
        for augmentation in (None, EVERYTHING):
            batch = next(_batches(task, 8, augmentation=augmentation).epoch())
            assert batch.images.shape == shape
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.labels.dtype == torch.int64
            assert bool(batch.images.isfinite().all())


def test_shuffled_epochs_visit_every_image_once_in_ever_new_orders(digits: ImageTask) -> None:
    # the label of an image is its number, so that batches tell which images they hold
    numbered = replace(digits, labels=torch.arange(len(digits.labels)))
    batches = _batches(numbered, shuffle=True)
    seen = [torch.cat([batch.labels for batch in batches.epoch(epoch)]) for epoch in range(3)]
    for order in seen:
        assert torch.equal(order.sort().values, digits.splits.train)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("augmentation", [None, EVERYTHING], ids=["plain", "everything"])
def test_an_epoch_goes_on_from_any_batch_bit_for_bit(
    digits: ImageTask, streamed: ImageTask, augmentation: Augmentation | None
) -> None:
    for task, size in ((digits, 100), (streamed, 7)):
        options = {"augmentation": augmentation, "shuffle": True}
        whole = list(_batches(task, size, **options).epoch(3))
        for start in (1, len(whole) - 1, len(whole)):
            rest = list(_batches(task, size, **options).epoch(3, start=start))
            assert _same(rest, whole[start:])


def test_seed_stream_and_epoch_each_change_the_draws(digits: ImageTask) -> None:
    options = {"augmentation": EVERYTHING, "shuffle": False}

    def first(epoch: int = 0, **changed: object) -> list[Batch]:
        return [next(_batches(digits, **{**options, **changed}).epoch(epoch))]

    reference = first()
    assert _same(reference, first())
    assert not _same(reference, first(epoch=1))
    assert not _same(reference, first(seed=1))
    assert not _same(reference, first(stream="other"))


def test_batches_neither_use_nor_move_the_global_generator(
    digits: ImageTask, streamed: ImageTask
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    options = {"augmentation": EVERYTHING, "shuffle": True}
    ones = [list(_batches(task, 9, **options).epoch()) for task in (digits, streamed)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    others = [list(_batches(task, 9, **options).epoch()) for task in (digits, streamed)]
    assert all(_same(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("augmentation", [None, EVERYTHING], ids=["plain", "everything"])
def test_workers_change_nothing(streamed: ImageTask, augmentation: Augmentation | None) -> None:
    options = {"augmentation": augmentation, "shuffle": True}
    alone = list(_batches(streamed, 8, workers=0, **options).epoch(1))
    helped = list(_batches(streamed, 8, workers=2, **options).epoch(1))
    assert _same(alone, helped)


def test_files_and_memory_give_the_same_batches(
    streamed: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RESIDENT_BYTES", 2**30)
    resident = load_task(streamed.name, root=Path("unused"), image_size=16)
    for augmentation in (None, replace(EVERYTHING, random_resized_crop=False)):
        options = {"augmentation": augmentation, "shuffle": True}
        ours = list(_batches(streamed, 8, **options).epoch())
        assert _same(ours, list(_batches(resident, 8, **options).epoch()))


def test_augmentation_keeps_the_image_recognisable(digits: ImageTask) -> None:
    """Shifted by at most one pixel, every image is one of nine shifts of its original."""
    batches = _batches(digits, 64, augmentation=Augmentation(crop_padding=1))
    batch = next(batches.epoch())
    plain = digits.images.gather(digits.splits.train[:64])
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1)).float() / 255
    padded = (padded - digits.mean[0]) / digits.std[0]
    shifts = torch.stack(
        [padded[:, :, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    )
    distance = (shifts - batch.images).abs().amax(dim=(2, 3, 4))  # [9, 64]
    assert float(distance.min(dim=0).values.max()) < 1e-5
    assert len(distance.argmin(dim=0).unique()) == 9


def test_half_of_the_images_are_mirrored(animals: ImageTask) -> None:
    batches = _batches(animals, 2000, augmentation=Augmentation(flip=True))
    images = next(batches.epoch()).images
    plain = next(_batches(animals, 2000).epoch()).images
    mirrored = (images == plain.flip(3)).flatten(1).all(1)
    kept = (images == plain).flatten(1).all(1)
    assert bool((mirrored | kept).all())
    assert 900 < int(mirrored.sum()) < 1100


def test_counts_and_drop_last(digits: ImageTask) -> None:
    count = len(digits.splits.train)  # 1,151
    kept, dropped = _batches(digits, 100), _batches(digits, 100, drop_last=True)
    assert (len(kept), kept.images_per_epoch) == (12, count)
    assert (len(dropped), dropped.images_per_epoch) == (11, 1100)
    assert [len(batch.labels) for batch in kept.epoch()] == [100] * 11 + [count - 1100]
    assert [len(batch.labels) for batch in dropped.epoch()] == [100] * 11
    large = _batches(digits, 10_000, drop_last=True)
    assert (len(large), large.batch_size, large.images_per_epoch) == (1, count, count)


def test_an_image_that_breaks_later_is_named(streamed: ImageTask) -> None:
    assert isinstance(streamed.images, FileImages)
    broken = streamed.images.paths[int(streamed.splits.train[0])]
    broken.write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(DataError, match=f"^the image digit-.*{broken.name} does not") as caught:
            list(_batches(streamed, 8, workers=workers).epoch())
        assert "\n" not in str(caught.value)


def test_impossible_batches_are_refused(digits: ImageTask) -> None:
    with pytest.raises(DataError, match="the split is empty"):
        Batches(digits, torch.empty(0, dtype=torch.int64), 8, seed=0, stream="test")
    with pytest.raises(ConfigurationError, match="batch_size 0"):
        _batches(digits, 0)
    with pytest.raises(ConfigurationError, match="workers -1"):
        _batches(digits, 8, workers=-1)


def test_augmented_images_equal_those_of_torchvision_one_by_one(animals: ImageTask) -> None:
    """The recipe of CIFAR-10, with the draws of the batch, image by image."""
    recipe = Augmentation(crop_padding=4, flip=True, cutout=6)
    made = list(_batches(animals, 64, augmentation=recipe, seed=3).epoch(2))[1].images
    _, height, width = animals.images.shape
    rng = generator(3, "test", "augment", 2, 1)
    tops, lefts, flips, rows, columns = (
        torch.randint(high, (64,), generator=rng).tolist() for high in (9, 9, 2, height, width)
    )
    originals = animals.images.gather(animals.splits.train[64:128])
    for number, (image, ours) in enumerate(zip(originals, made, strict=True)):
        padded = torchvision.pad(image, [4])
        image = torchvision.crop(padded, tops[number], lefts[number], height, width)
        if flips[number]:
            image = torchvision.horizontal_flip(image)
        scaled = torchvision.to_dtype(image, torch.float32, scale=True)
        normalised = torchvision.normalize(scaled, list(animals.mean), list(animals.std))
        top, left = max(rows[number] - 3, 0), max(columns[number] - 3, 0)
        bottom, right = min(rows[number] + 3, height), min(columns[number] + 3, width)
        hole = torch.zeros(1, 1, 1)
        expected = torchvision.erase(normalised, top, left, bottom - top, right - left, hole)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("augmentation", [None, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("free", [0, 2**40], ids=["in-memory", "on-the-device"])
def test_nothing_waits_for_the_device(
    digits: ImageTask,
    streamed: ImageTask,
    monkeypatch: pytest.MonkeyPatch,
    augmentation: Augmentation | None,
    free: int,
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda _: free)
    for task in (digits, streamed):
        made = _batches(task, 16, augmentation=augmentation, shuffle=True, device=META)
        with DeviceCopies() as watched:
            for batch in made.epoch():
                assert batch.images.device == META
                assert batch.labels.device == META
        assert watched.copies > 0
        assert watched.waiting == 0


def test_a_set_lies_on_the_device_where_a_quarter_of_it_is_enough(
    digits: ImageTask, streamed: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(digits.splits.train) * 8 * 8
    for free, place in (
        (4 * needed, "on the meta"),
        (4 * needed - 1, "in memory, too many for the meta's"),
    ):
        monkeypatch.setattr(batches, "free_memory", lambda _, free=free: free)
        made = _batches(digits, device=META)
        assert made.place == place
        with DeviceCopies() as watched:
            list(made.epoch())
        assert watched.copies >= (len(made) if "memory" in place else 1)
    assert _batches(digits).place == "on the cpu"
    assert _batches(streamed, device=META).place == "in files"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_changes_no_draw(digits: ImageTask) -> None:
    for augmentation in (None, EVERYTHING):
        options = {"augmentation": augmentation, "shuffle": True}
        ours = list(_batches(digits, **options).epoch())
        theirs = list(_batches(digits, device="cuda", **options).epoch())
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.labels, other.labels.cpu())
            torch.testing.assert_close(one.images, other.images.cpu(), atol=1e-4, rtol=1e-4)

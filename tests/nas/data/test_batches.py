"""Batches are what they say, and the same whenever and in whatever part they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nas.data import Augmentation, Batch, Batches, ImageTask, files, load_task
from nas.data.files import FileImages
from nas.errors import ConfigurationError, DataError

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

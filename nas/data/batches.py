"""Batches of a task: shuffled, augmented, normalised, and the same whenever they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nas.data.augment import (
    Augmentation,
    crop_boxes,
    cut_out,
    draw_integers,
    jitter,
    resized_crop,
    shift_and_flip,
)
from nas.data.files import FileImages, fit, stretch, to_tensor
from nas.data.task import ImageStore, ImageTask
from nas.errors import ConfigurationError, DataError
from nas.hardware import free_memory, to_device
from nas.randomness import generator

SHARE = 4  # a set on a GPU takes at most one in so many of the bytes that are free there


@dataclass(frozen=True, eq=False)
class Batch:
    """B labelled images on the device of their :class:`Batches`."""

    images: Tensor  # float32 [B, C, H, W], channels-last, normalised
    labels: Tensor  # int64 [B]
    head: slice | None = None  # which class scores are this data set's; None: all of them


class Batches:
    """Epochs of batches over ``indices`` of a task.

    Every batch is a pure function of (task digest, indices, seed, stream, epoch, batch number):
    a run that goes on from its checkpoint in the middle of an epoch sees what it would have seen.

    Sets in memory are held on ``device``, unless they take more than a quarter of what is free
    there; sets in files are decoded by ``workers`` processes (0: in this one). Wherever they lie,
    images are augmented on ``device``, which is never waited for. Where the set is smaller than
    ``batch_size``, batches shrink to the set, so that ``drop_last`` never leaves an epoch without
    a batch. ``place`` says where the images lie, for people.

    Args:
        indices: image numbers, int64 [n], usually one of ``task.splits``.
        stream: names the purpose ("weights", "alphas", "retrain"); streams draw independently.
        augmentation: None for evaluation.
        shuffle: a new order each epoch; else that of ``indices``.
        drop_last: leave out the last batch where it is not full.

    Raises DataError for no indices, ConfigurationError for a batch size below 1 or negative
    workers; while iterating, DataError for an image that does not decode.
    """

    def __init__(
        self,
        task: ImageTask,
        indices: Tensor,
        batch_size: int,
        *,
        seed: int,
        stream: str,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        if len(indices) == 0:
            raise DataError(f"no images of '{task.name}' to make batches of: the split is empty")
        if batch_size < 1 or workers < 0:
            raise ConfigurationError(
                f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0"
            )
        self.batch_size = min(batch_size, len(indices))
        self.images_per_epoch = len(indices)
        if drop_last:
            self.images_per_epoch -= len(indices) % self.batch_size
        self._seed, self._stream, self._shuffle = seed, stream, shuffle
        self._device = torch.device(device)
        self._count = len(indices)
        self._labels = task.labels[indices].to(self._device)
        self._augmentation = augmentation or Augmentation()
        self._mean = torch.tensor(task.mean, device=self._device)
        self._std = torch.tensor(task.std, device=self._device)
        self._source: _Source
        if isinstance(task.images, FileImages):
            crop = self._augmentation.random_resized_crop
            pin = self._device.type == "cuda"
            self._source = _Streamed(task.images, indices, seed, stream, crop, workers, pin)
            self.place = "in files"
        elif _fits(len(indices) * math.prod(task.images.shape), self._device):
            self._source = _Resident(task.images, indices, self._device)
            self.place = f"on the {self._device.type}"
        else:
            self._source = _Resident(task.images, indices, torch.device("cpu"))
            self.place = f"in memory, too many for the {self._device.type}'s"

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.images_per_epoch // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, ... of epoch ``epoch``, both counted from 0."""
        if self._shuffle:
            rng = generator(self._seed, self._stream, "order", epoch)
            order = torch.randperm(self._count, generator=rng)
        else:
            order = torch.arange(self._count)
        order = order[: self.images_per_epoch]
        labels = self._labels[to_device(order, self._device)].split(self.batch_size)[start:]
        chunks = order.split(self.batch_size)[start:]
        loaded = self._source.load(chunks, epoch, start * self.batch_size)
        for number, (own, pixels) in enumerate(zip(labels, loaded, strict=True), start):
            rng = generator(self._seed, self._stream, "augment", epoch, number)
            images = self._prepare(to_device(pixels, self._device), rng)
            yield Batch(images.permute(0, 3, 1, 2), own)

    def _prepare(self, pixels: Tensor, rng: torch.Generator) -> Tensor:
        """float32 [B, H, W, C], augmented and normalised, of uint8 ``pixels`` [B, H, W, C]."""
        wanted, device = self._augmentation, self._device
        count, height, width = pixels.shape[:3]
        if wanted.random_resized_crop and self._source.resident:
            boxes = to_device(crop_boxes(count, height, width, rng), device)
            pixels = resized_crop(pixels.float(), boxes)  # still 0..255, no longer whole numbers
        if wanted.crop_padding or wanted.flip:
            span = 2 * wanted.crop_padding + 1
            tops = draw_integers(count, span, rng, device)
            lefts = draw_integers(count, span, rng, device)
            flips = draw_integers(count, 2 if wanted.flip else 1, rng, device).bool()
            pixels = shift_and_flip(pixels, tops, lefts, flips, wanted.crop_padding)
        images = pixels.float() / 255
        if wanted.color_jitter:
            factors = 1 + (torch.rand(3, count, generator=rng) * 2 - 1) * wanted.color_jitter
            images = jitter(images, *to_device(factors, device))
        images = (images - self._mean) / self._std
        if wanted.cutout:
            rows = draw_integers(count, height, rng, device)
            columns = draw_integers(count, width, rng, device)
            images = cut_out(images, rows, columns, wanted.cutout)
        return images


def _fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes of images may lie on ``device``."""
    return device.type == "cpu" or SHARE * size <= free_memory(device)


class _Source(Protocol):
    """Where batches get their pixels. ``resident``: images come at their final size only."""

    resident: bool

    def load(self, chunks: Sequence[Tensor], epoch: int, first: int) -> Iterator[Tensor]:
        """uint8 [B, H, W, C] for each chunk of positions; ``first`` is where in the epoch it is."""


class _Resident:
    """A set in the memory of ``home``."""

    resident = True

    def __init__(self, images: ImageStore, indices: Tensor, home: torch.device) -> None:
        self._home = home
        self._pixels = images.gather(indices).permute(0, 2, 3, 1).contiguous().to(home)

    def load(self, chunks: Sequence[Tensor], epoch: int, first: int) -> Iterator[Tensor]:
        for chunk in chunks:
            yield self._pixels[to_device(chunk, self._home)]


class _Streamed:
    """A set in files, decoded ahead by worker processes."""

    resident = False

    def __init__(
        self,
        images: FileImages,
        indices: Tensor,
        seed: int,
        stream: str,
        random_crop: bool,
        workers: int,
        pin: bool,
    ) -> None:
        self._images, self._indices = images, indices
        self._workers, self._pin = workers, pin
        self._seed, self._stream, self._random_crop = seed, stream, random_crop

    def load(self, chunks: Sequence[Tensor], epoch: int, first: int) -> Iterator[Tensor]:
        crop_stream = self._stream if self._random_crop else None
        plan: list[list[tuple[int, int]]] = []  # (place in the epoch, image number)
        for chunk in chunks:
            numbers = self._indices[chunk].tolist()
            plan.append(list(enumerate(numbers, first)))
            first += len(numbers)
        loader = DataLoader(
            _Decoding(self._images, self._seed, crop_stream, epoch),
            batch_sampler=plan,
            num_workers=self._workers,
            collate_fn=_stack,
            pin_memory=self._pin,
            # without one of its own the loader draws from the global generator
            generator=generator(self._seed, self._stream, "loader", epoch),
        )
        for pixels in loader:
            if isinstance(pixels, DataError):
                raise pixels
            yield pixels


class _Decoding(Dataset):
    """Decodes one image a call, with a random resized crop where ``crop_stream`` names a stream."""

    def __init__(self, images: FileImages, seed: int, crop_stream: str | None, epoch: int) -> None:
        self._images, self._seed = images, seed
        self._crop_stream, self._epoch = crop_stream, epoch

    def __getitem__(self, key: tuple[int, int]) -> Tensor | DataError:
        place, number = key
        _, height, width = self._images.shape
        try:
            image = self._images.image(number)
        except DataError as error:
            return error  # raised in the parent: the loader would wrap it in a worker's traceback
        if self._crop_stream is None:
            return to_tensor(fit(image, height, width))
        rng = generator(self._seed, self._crop_stream, "crop", self._epoch, place)
        top, left, tall, wide = crop_boxes(1, image.height, image.width, rng)[0].tolist()
        box = (left, top, left + wide, top + tall)
        return to_tensor(stretch(image, box, height, width))


def _stack(images: list[Tensor | DataError]) -> Tensor | DataError:
    """uint8 [B, H, W, C], or the first error."""
    for image in images:
        if isinstance(image, DataError):
            return image
    stacked = torch.stack([image for image in images if isinstance(image, Tensor)])
    return stacked.permute(0, 2, 3, 1).contiguous()

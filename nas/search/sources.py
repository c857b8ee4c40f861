"""What a search learns from: the halves of one data set, or of several in turn.

With several, trunk and architecture parameters are shared and each set has a head of its own: its
block of columns of one classifier. Grey images among coloured ones are repeated in every channel,
so that all share the stem, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nas.data import Augmentation, Batch, Batches, ImageTask, TaskShape, halves
from nas.errors import ConfigurationError, UnknownNameError
from nas.randomness import generator
from nas.search.method import SearchConfig

SQUARE_ROOT, UNIFORM = "sqrt", "uniform"
SAMPLINGS = {SQUARE_ROOT: 0.5, UNIFORM: 0.0}  # a step takes set k with a chance ~ images ** power

Pair = tuple[Batch, Batch]  # a batch of the training half, one of the validation half


class Source:
    """One data set of a search.

    Attributes:
        name: as the user wrote it.
        metric: its name as a part of a metric's name.
        images: of both halves together.
        train, validation, evaluation: batches of the half that trains the weights, of the half
            that trains the architecture parameters, and of the latter without augmentation.
    """

    def __init__(
        self,
        task: ImageTask,
        config: SearchConfig,
        *,
        position: int,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        weight_half, architecture_half = halves(task, seed)
        augmentation = Augmentation(
            crop_padding=config.crop_padding, flip=config.flip and task.flip
        )

        # The supernet is evaluated by the statistics of each batch, too: a batch in stored order
        # may hold a single class, and a short one has poor statistics.
        def batches(indices: Tensor, stream: str, augment: bool) -> Batches:
            return Batches(
                task,
                indices,
                config.batch_size,
                seed=seed,
                stream=f"{stream}/{position}" if position else stream,
                device=device,
                augmentation=augmentation if augment else None,
                shuffle=True,
                drop_last=True,
                workers=workers,
            )

        self.name = task.name
        self.metric = re.sub(r"[^\w.-]", "-", task.name)
        self.images = len(weight_half) + len(architecture_half)
        self.train = batches(weight_half, "search/weights", True)
        self.validation = batches(architecture_half, "search/architecture", True)
        self.evaluation = batches(architecture_half, "search/evaluation", False)

    @property
    def steps(self) -> int:
        """Pairs of batches in one pass."""
        return min(len(self.train), len(self.validation))

    def pairs(self, start: int) -> Iterator[Pair]:
        """Pairs without end, pass after pass, from number ``start`` on."""
        number, position = divmod(start, self.steps)
        while True:
            yield from zip(
                self.train.epoch(number, position),
                self.validation.epoch(number, position),
                strict=False,
            )
            number, position = number + 1, 0


class Sources:
    """The data sets of a search and whose turn it is.

    Which set a step takes is drawn from (seed, epoch): a search that goes on from its checkpoint
    takes them in the same order.
    """

    def __init__(
        self,
        tasks: Sequence[ImageTask],
        config: SearchConfig,
        sampling: str,
        *,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.shape = joint_shape(tasks)
        if sampling not in SAMPLINGS:
            raise UnknownNameError("sampling", sampling, SAMPLINGS)
        self.each = [
            Source(task, config, position=position, seed=seed, device=device, workers=workers)
            for position, task in enumerate(tasks)
        ]
        self._seed = seed
        self._chances = torch.tensor([float(s.images) for s in self.each]) ** SAMPLINGS[sampling]
        ends = torch.tensor([task.shape.classes for task in tasks]).cumsum(0).tolist()
        self._heads = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]

    @property
    def steps(self) -> int:
        """Of an epoch: as many as one pass over every set would take."""
        return sum(source.steps for source in self.each)

    def pairs(self, epoch: int, start: int) -> Iterator[Pair]:
        """Pairs of batches from step ``start`` of epoch ``epoch`` on, both counted from 0."""
        turns = self._turns(epoch)
        before = [turn for past in range(epoch) for turn in self._turns(past)] + turns[:start]
        pairs = [source.pairs(before.count(number)) for number, source in enumerate(self.each)]
        for turn in turns[start:]:
            train, validation = next(pairs[turn])
            yield self._fitted(turn, train), self._fitted(turn, validation)

    def evaluations(self) -> list[Iterator[Batch]]:
        """For every set, the batches that it is evaluated on."""
        return [self._evaluation(number) for number in range(len(self.each))]

    def beginnings(self) -> list[Iterator[Batch]]:
        """For every set, the batches of its training half in the first pass."""
        return [self._beginning(number) for number in range(len(self.each))]

    def _beginning(self, number: int) -> Iterator[Batch]:
        return (self._fitted(number, batch) for batch in self.each[number].train.epoch())

    def _evaluation(self, number: int) -> Iterator[Batch]:
        return (self._fitted(number, batch) for batch in self.each[number].evaluation.epoch())

    def _turns(self, epoch: int) -> list[int]:
        if len(self.each) == 1:
            return [0] * self.steps
        draw = generator(self._seed, "search/sources", epoch)
        turns: list[int] = torch.multinomial(
            self._chances, self.steps, replacement=True, generator=draw
        ).tolist()
        return turns

    def _fitted(self, number: int, batch: Batch) -> Batch:
        """``batch`` with its head, and with as many channels as the stem sees."""
        if len(self.each) == 1:
            return batch
        images = batch.images.expand(-1, self.shape.channels, -1, -1)
        return replace(batch, images=images, head=self._heads[number])


def joint_shape(tasks: Sequence[ImageTask]) -> TaskShape:
    """The shape of a supernet for all ``tasks``: the largest images, the classes of all together.

    Raises:
        ConfigurationError: there is no task, one is there twice, or the channels are neither one
            nor those of the others.
    """
    digests = [task.digest for task in tasks]
    if not tasks or len(set(digests)) < len(digests):
        raise ConfigurationError(
            "a supernet is searched on one data set or on several different ones, not on "
            f"{', '.join(task.name for task in tasks) or 'none'}"
        )
    shapes = [task.shape for task in tasks]
    channels = max(shape.channels for shape in shapes)
    for task in tasks:
        if task.shape.channels not in (1, channels):
            raise ConfigurationError(
                f"the images of '{task.name}' have {task.shape.channels} channels, and those of "
                f"other sources {channels}: only grey images can join others"
            )
    return TaskShape(
        channels=channels,
        height=max(shape.height for shape in shapes),
        width=max(shape.width for shape in shapes),
        classes=sum(shape.classes for shape in shapes),
    )

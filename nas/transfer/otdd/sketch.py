"""What of a data set is needed to measure distances to it: class statistics and a few points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import ImageTask
from nas.data.splits import balanced_subset
from nas.errors import CheckpointError, ConfigurationError, DataError
from nas.observer import Observer
from nas.randomness import generator
from nas.transfer.otdd.embedding import Embedding, digest_of

KIND = "data set sketch"
POINTS = 2000  # embedded images kept for the outer problem; its exact solution takes a second
STATISTICS_IMAGES = 20_000  # of a larger set so many are embedded, evenly from the classes
CHUNK = 256  # images embedded at a time
_TENSORS = ("counts", "means", "factors", "ranks", "points", "labels")


@dataclass(frozen=True, eq=False)
class DatasetSketch:
    """A data set in the eyes of an embedding of d dimensions; the images are not needed again.

    The covariance of class k (divisor n - 1) is ``F.T @ F`` with F the k-th of
    :attr:`class_factors`, which has no more rows than the class has images.

    Attributes:
        name: of the data set, for people.
        data_digest: of the data set.
        embedding: digest of the embedding.
        seed: decided which images are points.
        classes: names of the K classes that have at least two images.
        counts: int64 [K], images of each class in the set.
        means: [K, d].
        factors: [R, d], the rows of all classes' factors, one class after the other.
        ranks: int64 [K], rows of each class; their sum is R.
        points: [m, d], embedded images.
        labels: int64 [m], the points' classes, every class among them.
    """

    name: str
    data_digest: str
    embedding: str
    seed: int
    classes: tuple[str, ...]
    counts: Tensor
    means: Tensor
    factors: Tensor
    ranks: Tensor
    points: Tensor
    labels: Tensor

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything but the name."""
        tensors = [getattr(self, name) for name in _TENSORS]
        return digest_of(KIND, self.data_digest, self.embedding, self.seed, self.classes, *tensors)

    @property
    def class_factors(self) -> tuple[Tensor, ...]:
        """K factors [r_k, d] of the covariances."""
        return self.factors.split(self.ranks.tolist())

    @property
    def weights(self) -> Tensor:
        """float64 [m] that sum to 1: a class weighs as in the whole set, its points alike."""
        shares = self.counts.double() / self.counts.sum()
        return (shares / torch.bincount(self.labels, minlength=len(self.counts)))[self.labels]


def describe(
    task: ImageTask,
    embedding: Embedding,
    seed: int,
    *,
    points: int = POINTS,
    observer: Observer | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DatasetSketch:
    """The sketch of ``task``: a pure function of its digest, the embedding, seed and points.

    Only training and validation images are looked at, never the test split.

    Args:
        points: images kept for the outer problem, evenly from the classes.
        observer: warned of classes that are left out since they have a single image.
        progress: called with (what, done, total) while images are embedded.

    Raises:
        DataError: fewer than two classes with two images, or an embedding that is not finite.
        ConfigurationError: fewer points than classes.
    """
    pool = torch.cat([task.splits.train, task.splits.val]).sort().values
    counts = torch.bincount(task.labels[pool], minlength=len(task.classes))
    kept = _usable_classes(task, counts, observer)
    pool = pool[torch.isin(task.labels[pool], kept)]
    chosen = balanced_subset(
        task.labels[pool], STATISTICS_IMAGES, generator(seed, "otdd", "statistics")
    )
    features = _embed(task, pool[chosen], embedding, progress)
    return summarise(
        features,
        torch.searchsorted(kept, task.labels[pool[chosen]]),
        name=task.name,
        data_digest=task.digest,
        embedding=embedding.digest,
        seed=seed,
        classes=tuple(task.classes[k] for k in kept.tolist()),
        counts=counts[kept],
        points=points,
    )


def summarise(
    features: Tensor,
    labels: Tensor,
    *,
    name: str,
    data_digest: str,
    embedding: str,
    seed: int,
    classes: tuple[str, ...],
    counts: Tensor | None = None,
    points: int = POINTS,
) -> DatasetSketch:
    """The sketch of ``features`` [N, d] with ``labels`` int64 [N]; keeps their floating type.

    ``counts`` [K] are the classes' sizes where the features are a sample of them; each class needs
    two features. Without it, the features are the whole set.
    """
    if points < len(classes):
        raise ConfigurationError(
            f"{points} points cannot show {len(classes)} classes: ask for at least one a class"
        )
    means, factors = [], []
    for label in range(len(classes)):
        own = features[labels == label].double()
        mean = own.mean(0)
        # the triangular factor R has R.T @ R = X.T @ X and min(n, d) rows
        factors.append(torch.linalg.qr((own - mean) / (len(own) - 1) ** 0.5, mode="r").R)
        means.append(mean)
    kept = balanced_subset(labels, points, generator(seed, "otdd", "points"))
    return DatasetSketch(
        name=name,
        data_digest=data_digest,
        embedding=embedding,
        seed=seed,
        classes=classes,
        counts=torch.bincount(labels, minlength=len(classes)) if counts is None else counts,
        means=torch.stack(means).to(features.dtype),
        factors=torch.cat(factors).to(features.dtype),
        ranks=torch.tensor([len(factor) for factor in factors]),
        points=features[kept],
        labels=labels[kept],
    )


def save_sketch(path: Path, sketch: DatasetSketch) -> None:
    """Write ``sketch`` as a checkpoint: one safetensors file with JSON in its header.

    Raises:
        CheckpointError: the file cannot be written.
    """
    values = {
        "kind": KIND,
        "name": sketch.name,
        "data_digest": sketch.data_digest,
        "embedding": sketch.embedding,
        "seed": sketch.seed,
        "classes": list(sketch.classes),
    }
    save_checkpoint(path, Checkpoint({name: getattr(sketch, name) for name in _TENSORS}, values))


def load_sketch(path: Path) -> DatasetSketch:
    """Read what :func:`save_sketch` wrote.

    Raises:
        CheckpointError: the file is damaged, or no sketch of ours.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.values.get("kind") != KIND:
        raise CheckpointError(f"{path} holds no {KIND}")
    try:
        sketch = _from_checkpoint(checkpoint.tensors, checkpoint.values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no whole {KIND}: {error} is missing") from error
    if not _consistent(sketch):
        raise CheckpointError(f"{path} is no {KIND}: its tensors do not fit one another")
    return sketch


def _from_checkpoint(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> DatasetSketch:
    return DatasetSketch(
        name=str(values["name"]),
        data_digest=str(values["data_digest"]),
        embedding=str(values["embedding"]),
        seed=int(values["seed"]),
        classes=tuple(map(str, values["classes"])),
        **{name: tensors[name] for name in _TENSORS},
    )


def _consistent(sketch: DatasetSketch) -> bool:
    """Whether shapes, types and label numbers are those that the computations rely on."""
    whole = (sketch.counts, sketch.ranks, sketch.labels)
    vectors = (sketch.means, sketch.factors, sketch.points)
    classes = len(sketch.classes)
    return bool(
        classes >= 2
        and all(t.dtype == torch.int64 and t.ndim == 1 for t in whole)
        and all(t.is_floating_point() and t.ndim == 2 and t.isfinite().all() for t in vectors)
        and len({t.shape[1] for t in vectors}) == 1
        and len(sketch.counts) == len(sketch.ranks) == len(sketch.means) == classes
        and sketch.counts.min() >= 2
        and sketch.ranks.min() >= 1
        and int(sketch.ranks.sum()) == len(sketch.factors)
        and len(sketch.labels) == len(sketch.points)
        and torch.equal(sketch.labels.unique(), torch.arange(classes))
    )


def _usable_classes(task: ImageTask, counts: Tensor, observer: Observer | None) -> Tensor:
    kept = (counts >= 2).nonzero().squeeze(1)
    dropped = [name for name, count in zip(task.classes, counts.tolist(), strict=True) if count < 2]
    if len(kept) < 2:
        raise DataError(
            f"'{task.name}' has {len(kept)} class(es) of at least two training and validation "
            "images: a distance between data sets needs two"
        )
    if dropped and observer is not None:
        listed = ", ".join(dropped[:5]) + (", ..." if len(dropped) > 5 else "")
        observer.on_warning(
            "dropped_classes",
            f"{len(dropped)} class(es) of '{task.name}' are left out of its distances, since a "
            f"single image has no covariance: {listed}",
        )
    return kept


def _embed(
    task: ImageTask,
    indices: Tensor,
    embedding: Embedding,
    progress: Callable[[str, int, int], None] | None,
) -> Tensor:
    """float [n, d] of the images ``indices`` [n]."""
    vectors: list[Tensor] = []
    for number, chunk in enumerate(indices.split(CHUNK)):
        if progress is not None:
            progress("images embedded", number * CHUNK, len(indices))
        vectors.append(embedding(task.images.gather(chunk)).detach().cpu())
        if vectors[-1].ndim != 2 or len(vectors[-1]) != len(chunk):
            raise ConfigurationError(
                f"the embedding '{embedding.name}' gave {tuple(vectors[-1].shape)} for "
                f"{len(chunk)} images: it must give one vector an image"
            )
    features = torch.cat(vectors)
    if bad := int((~features.isfinite().all(1)).sum()):
        raise DataError(
            f"the embedding '{embedding.name}' of {bad} image(s) of '{task.name}' is NaN or "
            "infinite: mend those images or choose other features"
        )
    return features

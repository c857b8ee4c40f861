"""Searches small enough to run in a second, and what two of them must share to be equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nas.data import Batch, ImageTask
from nas.observer import VALIDATION, BatchEvent, EpochRecord, Observer
from nas.search import BilevelSearch, Method, SearchConfig, SearchResult, Stage, find_method
from nas.spaces.darts.supernet import SupernetConfig

CPU = torch.device("cpu")
MEASURED = {"images_per_second", "epoch_seconds", "peak_memory_mb"}  # differ from run to run
SUPERNETS = {
    "darts": SupernetConfig(channels=2, cells=3),
    "darts-2nd": SupernetConfig(channels=2, cells=3),
    "pcdarts": SupernetConfig(channels=4, cells=3, partial=2, edge_normalisation=True),
}
OWN: dict[str, dict[str, object]] = {  # two epochs all the same, one of them in each stage
    "pdarts": {"epochs": 1, "stages": (Stage(8, 0, 0.3), Stage(4, 1, 0.5))}
}


class KilledError(Exception):
    """Stands for whatever ends a process between two batches."""


class Killer(Observer):
    """Ends the search after so many batches of a phase, counted over its epochs."""

    def __init__(self, after: int, phase: str = "search") -> None:
        self.left, self.phase = after, phase

    def on_batch(self, event: BatchEvent) -> None:
        self.left -= event.phase == self.phase
        if self.left == 0:
            raise KilledError


class Listener(Observer):
    """Remembers everything it is told."""

    def __init__(self) -> None:
        self.batches: list[BatchEvent] = []
        self.validations: list[BatchEvent] = []
        self.epochs: list[EpochRecord] = []
        self.warnings: list[tuple[str, str]] = []

    def on_batch(self, event: BatchEvent) -> None:
        (self.validations if event.phase == VALIDATION else self.batches).append(event)

    def on_epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)

    def on_warning(self, tag: str, message: str) -> None:
        self.warnings.append((tag, message))


def make_search(
    task: ImageTask,
    method: str | Method = "darts",
    *,
    seed: int = 0,
    device: torch.device = CPU,
    backend: str = "auto",
    storage: str = "float32",
    **settings: object,
) -> BilevelSearch:
    """Two epochs of two steps, unless ``settings`` of SearchConfig say otherwise."""
    method = find_method(method) if isinstance(method, str) else method
    values: dict[str, object] = {
        "supernet": SUPERNETS.get(method.name, SUPERNETS["darts"]),
        "epochs": 2,
        "batch_size": 40,
        "crop_padding": 1,
        "learning_rate": 0.1,
        "architecture_learning_rate": 0.01,
    }
    config = SearchConfig(**(values | OWN.get(method.name, {}) | settings))  # type: ignore[arg-type]
    return BilevelSearch(
        task, method, config, seed=seed, device=device, backend=backend, storage=storage
    )


def in_double(search: BilevelSearch) -> BilevelSearch:
    """The same search with a supernet in double precision."""
    search.supernet.double()
    return search


def double(batch: Batch) -> Batch:
    return Batch(batch.images.double(), batch.labels)


def pair(search: BilevelSearch) -> tuple[Batch, Batch]:
    """The first two batches of the first epoch, in the supernet's precision."""
    train, validation = next(search.batches())
    if search.supernet.weights.dtype == torch.float64:
        return double(train), double(validation)
    return train, validation


def outcome(result: SearchResult) -> dict[str, object]:
    """All that a search ends with but the time it took; tensors as lists of exact numbers."""
    state = {name: exact(tensor) for name, tensor in result.supernet.state_dict().items()}
    return {
        **state,
        "genotype": result.genotype,
        "mixing_history": exact(result.mixing_history),
        "metrics": comparable(result.records),
    }


def comparable(records: Iterable[EpochRecord]) -> list[tuple[int, dict[str, float]]]:
    return [
        (record.epoch, {k: v for k, v in record.metrics.items() if k not in MEASURED})
        for record in records
    ]


def exact(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()

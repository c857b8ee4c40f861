"""Trained networks and searched supernets on disk: tensors and JSON, nothing that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nas.architecture import Architecture
from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import TaskShape
from nas.errors import CheckpointError, NASError
from nas.optimisation import copy_tensors
from nas.spaces import find_space
from nas.spaces.base import Network
from nas.spaces.darts.supernet import Supernet, SupernetConfig

NETWORK, SUPERNET = "network", "supernet"


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its weights, and what is needed to build it again."""

    network: Network
    architecture: Architecture
    shape: TaskShape


def save_network(path: Path, trained: TrainedNetwork) -> None:
    """Write weights and architecture; the auxiliary head, which only serves training, stays out.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {
        name: tensor
        for name, tensor in trained.network.state_dict().items()
        if not name.startswith("auxiliary_head.")
    }
    values = {
        "kind": NETWORK,
        "architecture": trained.architecture.to_json(),
        "shape": asdict(trained.shape),
    }
    save_checkpoint(path, Checkpoint(tensors, values))


def load_network(path: Path) -> TrainedNetwork:
    """Read what :func:`save_network` wrote; the network is on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is no network of ours, or its tensors do not fit.
    """
    checkpoint = _read(path, NETWORK)
    with _building(path, NETWORK):
        architecture = Architecture.from_json(checkpoint.values["architecture"])
        shape = TaskShape(**checkpoint.values["shape"])
        network = find_space(architecture.space).network(
            architecture, shape, auxiliary=False, generator=torch.Generator()
        )
    copy_tensors(network.state_dict(), checkpoint.tensors, "this network")
    network.eval()
    return TrainedNetwork(network, architecture, shape)


def save_supernet(path: Path, supernet: Supernet, about: Mapping[str, Any]) -> None:
    """Write every weight under its own name, the architecture parameters and the statistics.

    Named tensors, not the flat vector: another supernet can take over those that fit it.
    ``about`` is kept beside them (method, data set, seed).

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {f"weights.{name}": tensor for name, tensor in supernet.named_weights()}
    tensors |= {name: t for name, t in supernet.state_dict().items() if name != "weights"}
    values = {
        "kind": SUPERNET,
        "config": asdict(supernet.config),
        "shape": asdict(supernet.shape),
        "about": dict(about),
    }
    save_checkpoint(path, Checkpoint(tensors, values))


def load_supernet(path: Path) -> Supernet:
    """Read what :func:`save_supernet` wrote, on the CPU.

    Raises:
        CheckpointError: the file is no supernet of ours, or its tensors do not fit.
    """
    checkpoint = _read(path, SUPERNET)
    with _building(path, SUPERNET):
        shape = TaskShape(**checkpoint.values["shape"])
        supernet = Supernet(shape, SupernetConfig(**checkpoint.values["config"]), seed=0)
    own = {name: t for name, t in supernet.state_dict().items() if name != "weights"}
    own |= {f"weights.{name}": view for name, view in supernet.named_weights()}
    copy_tensors(own, checkpoint.tensors, "this supernet")
    return supernet


def _read(path: Path, kind: str) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    if checkpoint.values.get("kind") != kind:
        raise CheckpointError(f"{path} holds no {kind}")
    return checkpoint


@contextmanager
def _building(path: Path, kind: str) -> Iterator[None]:
    """Whatever is wrong with the values of a file, it is the file that is to blame."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, NASError) as error:
        raise CheckpointError(f"{path} describes no {kind} that can be built: {error}") from error

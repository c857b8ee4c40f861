"""Trained networks and searched supernets on disk: tensors and JSON, nothing that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.architecture import Architecture
from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import TaskShape
from nas.errors import CheckpointError, NASError
from nas.optimisation import copy_tensors, without_prefix
from nas.spaces import find_space
from nas.spaces.base import Network
from nas.spaces.darts.supernet import Supernet

NETWORK, SUPERNET = "network", "supernet"
WEIGHTS, EXTRA = "weights.", "extra."  # prefixes of tensors in a supernet's file


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


def save_supernet(
    path: Path,
    supernet: Supernet,
    about: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write every weight under its own name, the architecture parameters and the statistics.

    Named tensors, not the flat vector: another supernet can take over those that fit it.
    ``about`` is kept beside them (method, data set, seed), and so are ``extra`` tensors.

    Raises:
        CheckpointError: the file cannot be written.
    """
    extra_tensors = {f"{EXTRA}{name}": tensor for name, tensor in (extra or {}).items()}
    values = {
        "kind": SUPERNET,
        "space": supernet.signature()["space"],
        "config": asdict(supernet.config),
        "shape": asdict(supernet.shape),
        "about": dict(about),
    }
    save_checkpoint(path, Checkpoint(_supernet_tensors(supernet) | extra_tensors, values))


@dataclass(frozen=True)
class SavedSupernet:
    """What a supernet's file holds; ``about`` and ``extra`` are for the reader to check."""

    supernet: Supernet
    about: Mapping[str, Any]
    extra: Mapping[str, Tensor]


def load_supernet(path: Path) -> Supernet:
    """The supernet that :func:`save_supernet` wrote, on the CPU.

    Raises:
        CheckpointError: as :func:`read_supernet`.
    """
    return read_supernet(path).supernet


def read_supernet(path: Path) -> SavedSupernet:
    """Read what :func:`save_supernet` wrote, on the CPU.

    The file may come from anywhere: names, shapes and types of its tensors are compared with what
    its configuration stands for before anything of that size is built.

    Raises:
        CheckpointError: the file is no supernet of ours, its tensors do not fit, or one holds
            numbers that are not finite.
    """
    checkpoint = _read(path, SUPERNET)
    extra = without_prefix(EXTRA[:-1], checkpoint.tensors)
    tensors = {n: t for n, t in checkpoint.tensors.items() if not n.startswith(EXTRA)}
    with _building(path, SUPERNET):
        values = checkpoint.values
        about = dict(values["about"])
        space, shape = find_space(values["space"]), TaskShape(**values["shape"])
        config = space.supernet_config(values["config"])
        _check_weights(path, tensors, space.weight_shapes(shape, config))
        supernet = space.supernet(shape, config, seed=0)
    own = _supernet_tensors(supernet)
    _check_tensors(path, tensors, own)
    copy_tensors(own, tensors, "this supernet")
    with _building(path, SUPERNET):
        supernet.check_operations()
    return SavedSupernet(supernet, about, extra)


def _supernet_tensors(supernet: Supernet) -> dict[str, Tensor]:
    """Views by the names of a file."""
    tensors = {f"{WEIGHTS}{name}": view for name, view in supernet.named_weights()}
    return tensors | {n: t for n, t in supernet.state_dict().items() if n != "weights"}


def _check_weights(
    path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare shapes with those that the configuration stands for, before memory is asked for."""
    for name, shape in wanted.items():
        tensor = tensors.get(f"{WEIGHTS}{name}")
        if tensor is None:
            raise CheckpointError(f"{path} lacks the tensor '{WEIGHTS}{name}'")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path} has '{WEIGHTS}{name}' of shape {tuple(tensor.shape)}, but {shape} is "
                "wanted"
            )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"{path} has a tensor {name[:80]!r} that no such supernet has")
        if tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path} has '{name}' of type {tensor.dtype}, but {own[name].dtype} is wanted"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} has numbers in '{name}' that are not finite")


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
    except (KeyError, TypeError, ValueError, RuntimeError, NASError) as error:
        raise CheckpointError(f"{path} describes no {kind} that can be built: {error}") from error

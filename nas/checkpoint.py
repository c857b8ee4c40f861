"""Atomic checkpoints that hold tensors and JSON, and nothing that could run.

A checkpoint is one safetensors file: the JSON rides in its header, so both halves are replaced
together. A reader sees the old file or the new one, never a mixture, whenever the writer dies.

safetensors is imported where a file is: a search without a checkpoint does without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and the JSON-able values that belong to them."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
        ) from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path`` atomically; tensors keep dtype and shape, not device.

    Raises:
        CheckpointError: as :func:`write_atomically`.
    """
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in checkpoint.tensors.items()
    }
    values = json.dumps(dict(checkpoint.values), sort_keys=True)
    header = {"values": values, "digest": _digest(values, tensors)}
    write_atomically(path, save(tensors, metadata=header))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or no checkpoint of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, digest = header["values"], header["digest"]
        values = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}") from error
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is no readable checkpoint: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no readable checkpoint: its values have no names")
    if digest != _digest(text, tensors):
        raise CheckpointError(f"{path} was altered: its contents do not match its digest")
    return Checkpoint({name: tensor.to(device) for name, tensor in tensors.items()}, values)


def _digest(values: str, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(f"{len(values)}:{values};".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()

"""The device a loop runs on, and what it costs there."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nas.errors import ConfigurationError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first GPU where there is one.

    Raises:
        ConfigurationError: the name means nothing to PyTorch or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"unknown device '{name}': use auto, cpu or cuda[:N]") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device '{name}' is not supported: use auto, cpu or cuda[:N]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device '{name}' was asked for, but PyTorch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device '{name}' was asked for, but there are {torch.cuda.device_count()} GPUs, "
            "counted from cuda:0"
        )
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without waiting for what is under way there.

    A copy from memory that may be paged out, which is what ``x.to(device)`` makes, waits.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes of the GPU ``device`` that no process has taken."""
    return torch.cuda.mem_get_info(device)[0]


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast where a GPU computes it natively; full precision elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: allocated on the GPU since the loop began, or resident on the CPU.

    The CPU's is that of the whole process since it started: earlier and parallel work counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

"""Which twins compute the supernet: native kernels where they can be had, else eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nas.errors import ConfigurationError, UnknownNameError
from nas.ops import build, mixed, native, stem
from nas.ops.mixed import CellPlan, Statistics

AUTO, NATIVE, EAGER = BACKENDS = ("auto", "native", "eager")
FLOAT32, BFLOAT16 = STORAGES = ("float32", "bfloat16")  # what images lie in between the cells


class MixedCells(Protocol):
    """What both twins are called like; see :func:`nas.ops.mixed.mixed_cells`."""

    def __call__(
        self,
        plans: Sequence[CellPlan],
        before_previous: Tensor,
        previous: Tensor,
        weights: Tensor,
        statistics: Statistics,
        operations: Tensor,
        edges: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor: ...


class Stem(Protocol):
    """What both stems are called like; see :func:`nas.ops.stem.stem`."""

    def __call__(
        self, images: Tensor, weights: Tensor, statistics: Statistics, stored: torch.dtype
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One of the twins, and why it.

    Attributes:
        name: "native" or "eager".
        reason: for people: the instruction set in use, or what stands in the way.
        devices: types of the devices that it has kernels for.
    """

    name: str
    reason: str
    devices: tuple[str, ...] = ("cpu",)

    def mixed_cells(self, device: torch.device) -> MixedCells:
        """The cells for tensors on ``device``; eager where no kernel is."""
        if self.name == NATIVE and device.type in self.devices:
            return native.mixed_cells
        return mixed.mixed_cells

    def stem(self, device: torch.device) -> Stem:
        """The stem for images on ``device``; eager where no kernel is."""
        return native.stem if self.name == NATIVE and device.type in self.devices else stem.stem


def choose(
    wanted: str = AUTO,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> Backend:
    """The backend for ``wanted`` ("auto", "native" or "eager") on ``device``, the CPU if None.

    The first call of a process may compile the kernels; ``say`` is told in one line.

    Raises:
        UnknownNameError: ``wanted`` is none of the three.
        ConfigurationError: native kernels are wanted, and cannot be had; the message says why.
    """
    if wanted not in BACKENDS:
        raise UnknownNameError("backend", wanted, BACKENDS)
    if wanted == EAGER:
        return Backend(EAGER, "as asked for")
    extension = build.load(say)
    if extension.module is None:
        reason = extension.reason
    else:
        info = extension.module.build_info()
        devices = ("cpu", "cuda") if info["cuda"] else ("cpu",)
        reason = f"{info['instruction_set']}, {extension.reason}"
        if device is None or device.type in devices:
            native.register()
            return Backend(NATIVE, reason, devices)
        reason = f"there are no native kernels for {device.type} in this build ({extension.reason})"
    if wanted == NATIVE:
        raise ConfigurationError(f"no native kernels: {reason}; backend 'eager' does without")
    return Backend(EAGER, reason)

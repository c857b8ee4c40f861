"""Learning-rate schedules, and optimisers whose state can be saved as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from nas.errors import CheckpointError


def cosine(start: float, end: float, epoch: int, epochs: int) -> float:
    """Learning rate of ``epoch``: half a cosine from ``start`` towards ``end``."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def flat_sgd(
    vector: Tensor, device: torch.device, *, rate: float, momentum: float, weight_decay: float
) -> SGD:
    """SGD for one flat ``vector`` on ``device``, which passes over its memory once.

    Not for other shapes: PyTorch's kernel takes a momentum to lie in memory as its parameter does,
    which one from a checkpoint need not. On a GPU the learning rate lies there too, so that a
    captured step reads what it is now.
    """
    return SGD(
        [vector],
        lr=torch.tensor(rate, device=device) if device.type == "cuda" else rate,
        momentum=momentum,
        weight_decay=weight_decay,
        fused=device.type in ("cpu", "cuda"),  # PyTorch has such a kernel for these
    )


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate ``rate``."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def pack_optimiser(prefix: str, optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: "<prefix>.<parameter>.<entry>"."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return {
        f"{prefix}.{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimiser.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimiser(prefix: str, optimiser: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`pack_optimiser` took.

    Raises:
        CheckpointError: a tensor fits no parameter of this optimiser.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if not name.startswith(f"{prefix}."):
            continue
        index, entry = name[len(prefix) + 1 :].split(".", 1)
        if int(index) >= len(parameters):
            raise CheckpointError(f"the checkpoint has an optimiser state '{name}' too many")
        parameter = parameters[int(index)]
        if entry != "step" and value.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint has '{name}' of shape {tuple(value.shape)}, but "
                f"{tuple(parameter.shape)} is wanted"
            )
        # Adam counts its steps in a tensor that stays on the CPU, unless graphs are to capture it.
        counts = entry == "step" and not optimiser.defaults.get("capturable")
        device = "cpu" if counts else parameter.device
        optimiser.state[parameter][entry] = value.to(device, copy=True)


def copy_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy ``source`` into the tensors of ``target``, name by name; ``what`` names the owner.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for name, tensor in target.items():
            if name not in source:
                raise CheckpointError(f"the checkpoint of {what} lacks the tensor '{name}'")
            if source[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the checkpoint of {what} has '{name}' of shape "
                    f"{tuple(source[name].shape)}, but {tuple(tensor.shape)} is wanted"
                )
            tensor.copy_(source[name])


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, "<prefix>." before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the tensors under "<prefix>.", by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}

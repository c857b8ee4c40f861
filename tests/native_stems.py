"""Calls of the stem with random tensors, made alike by its eager and its native twins."""

from __future__ import annotations

import torch
from torch import Tensor

from nas.ops import stem
from nas.ops.backend import Stem
from nas.ops.mixed import Statistics
from nas.randomness import generator


def draw(
    images: int, inputs: int, outputs: int, size: tuple[int, int], seed: int = 0
) -> dict[str, Tensor]:
    """Random images and weights in double precision, and a gradient for the result."""
    random = generator(seed, "test", "stem")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return {
        "images": normal(images, inputs, *size),
        "weights": 0.5 * normal(stem.stem_weights(inputs, outputs).size),
        "mean": 0.1 * normal(outputs),
        "variance": 0.5 + torch.rand(outputs, generator=random, dtype=torch.float64),
        "gradient": normal(images, outputs, *size),
    }


def run(
    twin: Stem,
    values: dict[str, Tensor],
    *,
    training: bool = True,
    update: bool = True,
    stored: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, running statistics and the gradient of the weights."""
    weights = values["weights"].clone().requires_grad_()
    statistics = Statistics(values["mean"].clone(), values["variance"].clone(), training, update)
    output = twin(values["images"], weights, statistics, stored or weights.dtype)
    (gradient,) = torch.autograd.grad(output, weights, values["gradient"].to(output.dtype))
    return {
        "output": output.detach(),
        "weights": gradient,
        "mean": statistics.mean,
        "variance": statistics.variance,
    }

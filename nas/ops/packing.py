"""Named tensors that live side by side in one flat vector.

A supernet has one weight vector: the optimiser, the gradient clip, the unrolled step of
second-order DARTS and a checkpoint each handle one tensor instead of a thousand, and a native
kernel finds a whole cell in one piece of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """The layout of a flat vector: names and shapes in memory order."""

    shapes: Mapping[str, Shape]

    @property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of ``flat`` [..., size] by name, each [..., *shape].

        One split for all, so that backward assembles the flat gradient once instead of adding a
        vector of zeros for every view.
        """
        pieces = flat.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: piece.unflatten(-1, shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

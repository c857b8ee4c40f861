"""One immutable value for "a network of a space"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nas.errors import ArchitectureError


@dataclass(frozen=True)
class Skeleton:
    """How searched cells are stacked into a network.

    Attributes:
        stem: "cifar" keeps the resolution, "imagenet" divides it by 8 before the first cell.
        channels: initial channels C; the network doubles them at each reduction.
        cells: number of cells L; the reductions stand at L // 3 and 2 * L // 3.
    """

    stem: str
    channels: int
    cells: int

    def __post_init__(self) -> None:
        if self.stem not in ("cifar", "imagenet"):
            raise ArchitectureError(f"stem is 'cifar' or 'imagenet', not {self.stem!r}")
        if self.channels < 1 or self.cells < 1:
            raise ArchitectureError(
                f"a network needs channels and cells of at least 1, not {self.channels} and "
                f"{self.cells}"
            )


@dataclass(frozen=True)
class Architecture:
    """A point of a search space: what was decided, and the skeleton it is stacked in.

    ``decisions`` pairs each decision's name with its choice, in the space's order; two
    architectures that build the same network of the same space are equal. Use
    ``nas.spaces.SPACES[space]`` to make one, since the space checks the decisions.
    """

    space: str
    decisions: tuple[tuple[str, str], ...]
    skeleton: Skeleton

    def with_skeleton(self, skeleton: Skeleton) -> Architecture:
        """The same cells in another skeleton: the `cell` transfer of NASTransfer."""
        return replace(self, skeleton=skeleton)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form that :meth:`from_json` reads back."""
        return {
            "space": self.space,
            "decisions": dict(self.decisions),
            "skeleton": asdict(self.skeleton),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Architecture:
        """Read :meth:`to_json`'s form; the space of that name checks every decision.

        Raises:
            ArchitectureError: a field is missing or a decision is not one of the space's.
            UnknownNameError: no space has that name.
        """
        from nas.spaces import find_space  # the spaces build Architectures: import late

        try:
            skeleton = Skeleton(**value["skeleton"])
            return find_space(value["space"]).architecture(value["decisions"], skeleton)
        except (KeyError, TypeError) as error:
            raise ArchitectureError(f"this is no architecture: {error} is missing") from error

    @property
    def digest(self) -> str:
        """12 hex digits that name this architecture, cells and skeleton."""
        return _digest(self.to_json())

    @property
    def genotype_digest(self) -> str:
        """12 hex digits that name what was decided, the same in every skeleton."""
        return _digest([self.space, self.decisions])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

"""The search spaces by name."""

from __future__ import annotations

from nas.errors import UnknownNameError
from nas.spaces.base import Network, Space
from nas.spaces.darts import DartsSpace

SPACES: dict[str, Space] = {"darts": DartsSpace()}


def find_space(name: str) -> Space:
    """The space of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in SPACES:
        raise UnknownNameError("space", name, SPACES)
    return SPACES[name]


__all__ = ["SPACES", "DartsSpace", "Network", "Space", "find_space"]

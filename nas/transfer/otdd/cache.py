"""Distances that were computed before, one small JSON file each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import ot

from nas.checkpoint import write_atomically
from nas.transfer.otdd.distance import OTDDConfig, distance
from nas.transfer.otdd.sketch import DatasetSketch


def cached_distance(
    a: DatasetSketch,
    b: DatasetSketch,
    config: OTDDConfig,
    folder: Path,
    compute: Callable[[DatasetSketch, DatasetSketch, OTDDConfig], float] = distance,
) -> float:
    """:func:`distance`, or what it gave before for the same two sets in either order.

    The key covers both sketches (with the digests of data and embedding, the seed and the
    points), the configuration and the code. A file that cannot be read is computed again.

    Args:
        folder: of the cache; made where it is missing.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    first, second = sorted((a, b), key=lambda sketch: sketch.digest)
    key = [first.digest, second.digest, asdict(config), _code()]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name[:32]}.json"
    value = _read(path)
    if value is None:
        value = compute(first, second, config)
        about = {"distance": value, "sets": [first.name, second.name], "config": asdict(config)}
        write_atomically(path, json.dumps(about).encode())
    return value


def _read(path: Path) -> float | None:
    try:
        value = json.loads(path.read_text())["distance"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = isinstance(value, float) and math.isfinite(value) and value >= 0
    return value if usable else None


@cache
def _code() -> str:
    """What computes a distance: this package's sources and the version of its solver."""
    state = hashlib.sha256(ot.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()

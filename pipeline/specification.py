"""An architecture as a user names it: a published genotype, a file, or a run that found one."""

from __future__ import annotations

import json
from pathlib import Path

from nas.architecture import Architecture, Skeleton
from nas.errors import ArchitectureError, UnknownNameError
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED, Genotype, read_genotype
from pipeline.tracking import Tracker

RUN = "run:"
ARCHITECTURE_FILE = "architecture.json"
LARGEST_FILE = 100_000  # bytes; an architecture takes about two thousand


def read_architecture(name: str, skeleton: Skeleton, tracker: Tracker) -> Architecture:
    """The architecture called ``name``.

    Args:
        name: a published genotype ("DARTS_V2"), ``run:ID`` of a search or transfer, or the path
            of a file: an architecture or genotype as JSON, or a genotype in the text form of the
            DARTS code.
        skeleton: for all but an architecture's file, which has its own; that of a run is the
            supernet's, or made for another target.

    Raises:
        UnknownNameError: neither a published name nor a file.
        ArchitectureError: the file or the run holds no architecture.
        TrackingError: the run cannot be read.
    """
    if name in PUBLISHED:
        return DartsSpace().from_genotype(PUBLISHED[name], skeleton)
    if name.startswith(RUN):
        path = tracker.artifacts(name[len(RUN) :]) / ARCHITECTURE_FILE
        if not path.is_file():
            raise ArchitectureError(f"'{name}' has no {ARCHITECTURE_FILE}: name a search's run")
        return _read_file(path, skeleton).with_skeleton(skeleton)
    path = Path(name)
    if not path.is_file():
        raise UnknownNameError("architecture (and no such file)", name, [*PUBLISHED, "run:ID"])
    return _read_file(path, skeleton)


def _read_file(path: Path, skeleton: Skeleton) -> Architecture:
    if path.stat().st_size > LARGEST_FILE:
        raise ArchitectureError(f"{path} is too large for an architecture")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ArchitectureError(f"{path} is no text: {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return DartsSpace().from_genotype(read_genotype(text), skeleton)
    if isinstance(value, dict) and "decisions" in value:
        return Architecture.from_json(value)
    return DartsSpace().from_genotype(Genotype.from_json(value), skeleton)

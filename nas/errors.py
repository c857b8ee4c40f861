"""Errors a user can mend: a message says in a sentence or two what is wrong and what is right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NASError(Exception):
    """Base of every error this project raises on purpose; shown without a traceback."""


class ConfigurationError(NASError):
    """A setting that cannot work."""


class DataError(NASError):
    """A data set that is missing, broken or too small."""


class ArchitectureError(NASError):
    """An architecture or genotype that its space cannot build."""


class CheckpointError(NASError):
    """A checkpoint that is truncated, altered, or of something else."""


class NonFiniteLossError(NASError):
    """Training left the finite numbers."""


class TrackingError(NASError):
    """The tracking server or the model registry does not do what was asked."""


class NativeError(NASError):
    """The native extension cannot be found, compiled or loaded."""


class UnknownNameError(NASError):
    """A name that is in no table; the message suggests the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        super().__init__(f"unknown {kind} '{name}': {hint}known are {', '.join(known)}")

"""Which twin of the mixed cell computes: native kernels where they can be had, else eager."""

from __future__ import annotations

from nas.ops import mixed, native


def mixed_cell_of(backend):
    return native.mixed_cell if backend == "native" else mixed.mixed_cell

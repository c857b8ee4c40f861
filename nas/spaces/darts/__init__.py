"""The DARTS space: a normal and a reduction cell of four nodes, stacked."""

from nas.spaces.darts.genotype import (
    EDGES,
    NODES,
    OPERATIONS,
    PUBLISHED,
    Gene,
    Genotype,
    derive,
    read_genotype,
    skip_count,
)
from nas.spaces.darts.space import DartsSpace

__all__ = [
    "EDGES",
    "NODES",
    "OPERATIONS",
    "PUBLISHED",
    "DartsSpace",
    "Gene",
    "Genotype",
    "derive",
    "read_genotype",
    "skip_count",
]

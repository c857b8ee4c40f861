"""Distances between data sets by optimal transport: describe each set once, compare sketches."""

from nas.transfer.otdd.distance import OTDDConfig, distance, squared_distance
from nas.transfer.otdd.embedding import Embedding, pixels
from nas.transfer.otdd.sketch import DatasetSketch, describe, load_sketch, save_sketch, summarise

__all__ = [
    "DatasetSketch",
    "Embedding",
    "OTDDConfig",
    "describe",
    "distance",
    "load_sketch",
    "pixels",
    "save_sketch",
    "squared_distance",
    "summarise",
]

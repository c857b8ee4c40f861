"""Distances between data sets by optimal transport: describe each set once, compare sketches."""

from nas.transfer.otdd.cache import cached_distance
from nas.transfer.otdd.distance import OTDDConfig, distance, squared_distance
from nas.transfer.otdd.embedding import Embedding, pixels, principal_components, shapes
from nas.transfer.otdd.networks import pretrained, supernet_trunk
from nas.transfer.otdd.sketch import DatasetSketch, describe, load_sketch, save_sketch, summarise

__all__ = [
    "DatasetSketch",
    "Embedding",
    "OTDDConfig",
    "cached_distance",
    "describe",
    "distance",
    "load_sketch",
    "pixels",
    "pretrained",
    "principal_components",
    "save_sketch",
    "shapes",
    "squared_distance",
    "summarise",
    "supernet_trunk",
]

"""Supernets of the zoo, made without searching."""

from __future__ import annotations

from nas.data import ImageTask
from nas.search.sources import joint_shape
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.transfer.zoo import Card, SourceCard, ZooEntry, image_hashes

CONFIG = SupernetConfig(channels=4, cells=3)


def make_entry(*tasks: ImageTask, config: SupernetConfig = CONFIG, seed: int = 0) -> ZooEntry:
    """An entry whose supernet is fresh from ``seed``."""
    card = Card("darts", seed, tuple(map(SourceCard.of, tasks)), (0.25, 0.5), 1.5)
    supernet = Supernet(joint_shape(tasks), config, seed=seed, backend="eager")
    return ZooEntry(supernet, card, image_hashes(*tasks))

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from nas.architecture import Architecture, Skeleton
from nas.errors import ArchitectureError, UnknownNameError
from nas.spaces.darts import PUBLISHED, DartsSpace

SKELETON = Skeleton("cifar", 36, 20)
ARCHITECTURE = DartsSpace().from_genotype(PUBLISHED["DARTS_V2"], SKELETON)


def test_json_round_trip():
    text = json.dumps(ARCHITECTURE.to_json())
    again = Architecture.from_json(json.loads(text))
    assert again == ARCHITECTURE
    assert hash(again) == hash(ARCHITECTURE)
    assert again.digest == ARCHITECTURE.digest


def test_json_in_another_order_is_the_same_architecture():
    value = ARCHITECTURE.to_json()
    value["decisions"] = dict(reversed(value["decisions"].items()))
    assert Architecture.from_json(value) == ARCHITECTURE


def test_the_digest_names_the_architecture_for_ever():
    # A literal: digests name runs and models that outlive this version of the code.
    assert ARCHITECTURE.digest == "6a29faf36206"
    wider = ARCHITECTURE.with_skeleton(replace(SKELETON, channels=38))
    other = DartsSpace().from_genotype(PUBLISHED["DARTS_V1"], SKELETON)
    assert len({ARCHITECTURE.digest, wider.digest, other.digest}) == 3


def test_with_skeleton_keeps_the_cells():
    skeleton = Skeleton("imagenet", 48, 14)
    moved = ARCHITECTURE.with_skeleton(skeleton)
    assert moved.decisions == ARCHITECTURE.decisions
    assert moved.skeleton == skeleton
    assert ARCHITECTURE.skeleton == SKELETON


def test_an_architecture_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ARCHITECTURE.space = "other"


@pytest.mark.parametrize(
    ("fields", "message"),
    [(("cifar10", 36, 20), "'cifar10'"), (("cifar", 0, 20), "0 and 20"), (("cifar", 4, 0), "4")],
)
def test_an_impossible_skeleton(fields, message):
    with pytest.raises(ArchitectureError, match=message):
        Skeleton(*fields)


@pytest.mark.parametrize("field", ["space", "decisions", "skeleton"])
def test_a_missing_field_is_named(field):
    value = ARCHITECTURE.to_json()
    del value[field]
    with pytest.raises(ArchitectureError, match=field):
        Architecture.from_json(value)


def test_json_with_wrong_contents():
    value = ARCHITECTURE.to_json()
    with pytest.raises(UnknownNameError, match="unknown space"):
        Architecture.from_json(value | {"space": "drats"})
    with pytest.raises(ArchitectureError, match=r"normal\.2\.op0"):
        Architecture.from_json(value | {"decisions": value["decisions"] | {"normal.2.op0": "conv"}})
    with pytest.raises(ArchitectureError):
        Architecture.from_json(value | {"skeleton": {"stem": "cifar", "depth": 3}})
    with pytest.raises(ArchitectureError, match="even number of channels"):
        Architecture.from_json(value | {"skeleton": value["skeleton"] | {"channels": 35}})

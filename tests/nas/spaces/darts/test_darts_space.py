from __future__ import annotations

import math

import pytest
import torch

from nas.architecture import Architecture, Skeleton
from nas.data.task import TaskShape
from nas.errors import ArchitectureError
from nas.spaces.darts import PUBLISHED, DartsSpace, Gene, Genotype

SPACE = DartsSpace()
SKELETON = Skeleton("cifar", 8, 3)


def test_the_space_has_the_published_number_of_points():
    points = math.prod(len(choices) for choices in SPACE.decisions().values())
    assert points == (1 * 3 * 6 * 10 * 7**8) ** 2


def test_decision_names_and_choices():
    decisions = SPACE.decisions()
    assert list(decisions)[:3] == ["normal.2.inputs", "normal.2.op0", "normal.2.op1"]
    assert len(decisions) == 24
    assert decisions["reduce.3.inputs"] == ("0,1", "0,2", "1,2")
    assert len(decisions["reduce.5.op1"]) == 7
    assert "none" not in decisions["reduce.5.op1"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_genotypes_and_architectures_are_two_forms_of_the_same(name):
    architecture = SPACE.from_genotype(PUBLISHED[name], SKELETON)
    assert SPACE.genotype(architecture) == PUBLISHED[name]
    assert architecture.skeleton == SKELETON
    assert [key for key, _ in architecture.decisions] == list(SPACE.decisions())


def test_every_combination_of_choices_is_an_architecture():
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        decisions = {
            name: choices[torch.randint(len(choices), (), generator=draw)]
            for name, choices in SPACE.decisions().items()
        }
        architecture = SPACE.architecture(decisions, SKELETON)
        assert dict(architecture.decisions) == decisions
        genotype = SPACE.genotype(architecture)
        assert SPACE.from_genotype(genotype, SKELETON) == architecture
        seen.add(architecture)
    assert len(seen) == 50


def test_op0_belongs_to_the_smaller_source():
    genes = tuple(
        gene for _ in range(4) for gene in (Gene("sep_conv_5x5", 1), Gene("skip_connect", 0))
    )
    decisions = dict(SPACE.from_genotype(Genotype(genes, genes), SKELETON).decisions)
    assert decisions["normal.4.inputs"] == "0,1"
    assert decisions["normal.4.op0"] == "skip_connect"
    assert decisions["normal.4.op1"] == "sep_conv_5x5"


def test_the_order_of_given_decisions_does_not_matter():
    architecture = SPACE.from_genotype(PUBLISHED["DARTS_V2"], SKELETON)
    backwards = dict(reversed(architecture.decisions))
    assert SPACE.architecture(backwards, SKELETON) == architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal.9.op0": "skip_connect"}, "'normal.9.op0' is no decision of the darts space"),
        ({"normal.3.inputs": "2,1"}, "'normal.3.inputs' is '2,1'; its choices are 0,1 0,2 1,2"),
        ({"reduce.5.op1": "none"}, "'reduce.5.op1' is 'none'"),
        ({"reduce.5.op1": ["skip_connect"]}, "'reduce.5.op1' is"),
    ],
)
def test_a_wrong_decision_is_named(change, message):
    decisions = dict(SPACE.from_genotype(PUBLISHED["DARTS_V2"], SKELETON).decisions)
    with pytest.raises(ArchitectureError, match=message):
        SPACE.architecture(decisions | change, SKELETON)


def test_a_missing_decision_is_named():
    decisions = dict(SPACE.from_genotype(PUBLISHED["DARTS_V2"], SKELETON).decisions)
    del decisions["reduce.4.inputs"]
    with pytest.raises(ArchitectureError, match=r"'reduce.4.inputs' is missing"):
        SPACE.architecture(decisions, SKELETON)
    with pytest.raises(ArchitectureError, match="choices by name"):
        SPACE.architecture([], SKELETON)


def test_a_skeleton_needs_even_whole_channels_and_whole_cells():
    genotype = PUBLISHED["DARTS_V2"]
    for channels in (7, 8.0):
        with pytest.raises(ArchitectureError, match=f"even number of channels, not {channels}"):
            SPACE.from_genotype(genotype, Skeleton("cifar", channels, 3))
    with pytest.raises(ArchitectureError, match=r"whole number, not 2\.5"):
        SPACE.from_genotype(genotype, Skeleton("cifar", 8, 2.5))


def test_an_architecture_that_did_not_come_from_the_space_is_checked():
    good = SPACE.from_genotype(PUBLISHED["DARTS_V2"], SKELETON)
    with pytest.raises(ArchitectureError, match="'mobile' is no darts architecture"):
        SPACE.genotype(Architecture("mobile", good.decisions, SKELETON))
    with pytest.raises(ArchitectureError, match="is missing"):
        SPACE.genotype(Architecture("darts", good.decisions[1:], SKELETON))
    with pytest.raises(ArchitectureError, match="even number"):
        SPACE.meta_network(
            good.with_skeleton(Skeleton("cifar", 9, 3)), TaskShape(1, 8, 8, 2), auxiliary=False
        )

"""The table of methods, their papers' settings, and what a genotype is derived from."""

from __future__ import annotations

import math

import pytest
import torch

from nas.data import TaskShape
from nas.errors import UnknownNameError
from nas.search import METHODS, SearchConfig, Stage, find_method
from nas.search.collapse import collapse_metrics
from nas.spaces.darts import PUBLISHED
from nas.spaces.darts.supernet import Mixing, Supernet, SupernetConfig

SHAPE = TaskShape(1, 8, 8, 4)


def test_each_method_stands_under_its_own_name() -> None:
    assert set(METHODS) == {"darts", "darts-2nd", "pcdarts", "pdarts"}
    assert all(find_method(name).name == name for name in METHODS)


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'pc-darts': did you mean 'pcdarts'"):
        find_method("pc-darts")


@pytest.mark.parametrize("name", ["darts", "darts-2nd"])
def test_settings_of_darts(name: str) -> None:
    assert find_method(name).paper_config() == SearchConfig(
        supernet=SupernetConfig(channels=16, cells=8, partial=1, edge_normalisation=False),
        epochs=50,
        batch_size=64,
        learning_rate=0.025,
        learning_rate_end=0.001,
        momentum=0.9,
        weight_decay=3e-4,
        gradient_clip=5.0,
        architecture_learning_rate=3e-4,
        architecture_weight_decay=1e-3,
        warmup_epochs=0,
    )


def test_settings_of_pcdarts() -> None:
    assert find_method("pcdarts").paper_config() == SearchConfig(
        supernet=SupernetConfig(channels=16, cells=8, partial=4, edge_normalisation=True),
        epochs=50,
        batch_size=256,
        learning_rate=0.1,
        learning_rate_end=0.0,
        momentum=0.9,
        weight_decay=3e-4,
        gradient_clip=5.0,
        architecture_learning_rate=6e-4,
        architecture_weight_decay=1e-3,
        warmup_epochs=15,
    )


def test_settings_of_pdarts() -> None:
    assert find_method("pdarts").paper_config() == SearchConfig(
        supernet=SupernetConfig(channels=16, cells=5, partial=1, edge_normalisation=False),
        epochs=25,
        batch_size=96,
        learning_rate=0.025,
        learning_rate_end=0.0,
        momentum=0.9,
        weight_decay=3e-4,
        gradient_clip=5.0,
        architecture_learning_rate=6e-4,
        architecture_weight_decay=1e-3,
        warmup_epochs=10,
        stages=(Stage(None, 0, 0.0), Stage(5, 6, 0.4), Stage(3, 12, 0.7)),
    )


def test_the_genotype_weighs_edges_by_their_betas() -> None:
    """Equal alphas but for one operation an edge; the betas alone choose the edges."""
    supernet = Supernet(SHAPE, SupernetConfig(channels=4, cells=3, edge_normalisation=True), seed=0)
    assert supernet.betas is not None
    with torch.no_grad():
        supernet.alphas.zero_()
        supernet.alphas[0, :, 6] = 1.0  # dilated 3x3 in the normal cell
        supernet.alphas[1, :, 1] = 1.0  # max-pool in the reduction cell
        supernet.alphas[..., 0] = 9.0  # none is strongest, and never chosen
        supernet.betas.zero_()
        for edge in (3, 4, 6, 8, 9, 13):  # two of each node's edges but the first's
            supernet.betas[:, edge] = 2.0
    genotype = supernet.derive(find_method("pcdarts").mixing(supernet))
    assert [gene.source for gene in genotype.normal] == [0, 1, 1, 2, 1, 3, 0, 4]
    assert [gene.source for gene in genotype.reduce] == [0, 1, 1, 2, 1, 3, 0, 4]
    assert {gene.operation for gene in genotype.normal} == {"dil_conv_3x3"}
    assert {gene.operation for gene in genotype.reduce} == {"max_pool_3x3"}


def test_a_genotype_survives_its_own_discretisation() -> None:
    supernet = Supernet(SHAPE, SupernetConfig(channels=4, cells=3, edge_normalisation=True), seed=0)
    mixing = find_method("pcdarts").mixing(supernet)
    for genotype in PUBLISHED.values():
        assert supernet.derive(mixing.discretised(genotype)) == genotype


def test_entropy_by_hand() -> None:
    weights = torch.zeros(2, 14, 8)
    weights[0] = 1 / 8
    weights[1, :7, 2] = 1.0  # decided
    weights[1, 7:, :2] = 0.5  # between two
    metrics = collapse_metrics(Mixing(weights), PUBLISHED["DARTS_V2"])
    assert metrics["alpha/entropy_normal"] == pytest.approx(math.log(8), rel=1e-6)
    assert metrics["alpha/entropy_reduce"] == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert metrics["skip/normal"] == 2
    assert metrics["skip/reduce"] == 3

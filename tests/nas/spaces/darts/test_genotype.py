from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import ArchitectureError
from nas.spaces.darts.genotype import (
    EDGES,
    OPERATIONS,
    PUBLISHED,
    Gene,
    Genotype,
    derive,
    read_genotype,
    skip_count,
)

# The text that the DARTS authors print for their second-order cell.
DARTS_V2_TEXT = """DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0),
('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1),
('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)],
reduce_concat=[2, 3, 4, 5])"""


@st.composite
def cells(draw):
    genes = []
    for node in range(2, 6):
        sources = draw(st.permutations(range(node)))[:2]
        genes += [Gene(draw(st.sampled_from(OPERATIONS[1:])), source) for source in sources]
    return tuple(genes)


genotypes = st.builds(Genotype, cells(), cells())


def reference_text(genotype: Genotype) -> str:
    def cell(genes):
        return [(gene.operation, gene.source) for gene in genes]

    return (
        f"Genotype(normal={cell(genotype.normal)!r}, normal_concat=range(2, 6), "
        f"reduce={cell(genotype.reduce)!r}, reduce_concat=range(2, 6))"
    )


def test_edges_are_the_14_pairs_in_the_reference_order():
    assert len(EDGES) == 14
    assert EDGES[:6] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4))
    assert EDGES[-1] == (4, 5)
    assert OPERATIONS[0] == "none"
    assert OPERATIONS[3] == "skip_connect"


@settings(max_examples=50, deadline=None)
@given(genotypes)
def test_json_and_reference_text_round_trip(genotype):
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype
    assert read_genotype(json.dumps(genotype.to_json())) == genotype
    assert read_genotype(reference_text(genotype)) == genotype
    assert read_genotype(f"\n best_1 = {reference_text(genotype)}\n") == genotype


def test_the_order_inside_a_node_does_not_matter():
    genes = [list(gene) for gene in PUBLISHED["DARTS_V1"].to_json()["normal"]]
    swapped = [genes[index ^ 1] for index in range(8)]
    value = PUBLISHED["DARTS_V1"].to_json() | {"normal": swapped}
    assert swapped != genes
    assert Genotype.from_json(value) == PUBLISHED["DARTS_V1"]
    assert hash(Genotype.from_json(value)) == hash(PUBLISHED["DARTS_V1"])


def test_published_genotypes():
    assert set(PUBLISHED) == {
        "DARTS_V1",
        "DARTS_V2",
        "PDARTS",
        "PC_DARTS_CIFAR",
        "PC_DARTS_IMAGENET",
    }
    assert read_genotype(DARTS_V2_TEXT) == PUBLISHED["DARTS_V2"]
    assert [skip_count(genotype.normal) for genotype in PUBLISHED.values()] == [3, 2, 2, 1, 2]


def test_a_genotype_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PUBLISHED["DARTS_V1"].normal = ()


GOOD = PUBLISHED["DARTS_V1"].normal


@pytest.mark.parametrize(
    ("position", "gene", "message"),
    [
        (3, Gene("conv_9x9", 1), "node 3 of the normal cell has operation 'conv_9x9'"),
        (0, Gene("none", 0), "node 2 of the normal cell has operation 'none'"),
        (1, Gene("sep_conv_3x3", 2), "node 2 of the normal cell takes state 2"),
        (7, Gene("sep_conv_3x3", -1), "node 5 of the normal cell takes state -1"),
        (7, Gene("sep_conv_3x3", True), "takes state True"),
        (7, Gene("sep_conv_3x3", "1"), "takes state '1'"),
        (7, Gene(["sep_conv_3x3"], 1), "has operation"),
        (1, Gene("sep_conv_3x3", 0), "node 2 of the normal cell takes state 0 twice"),
    ],
)
def test_an_impossible_gene_is_named(position, gene, message):
    genes = (*GOOD[:position], gene, *GOOD[position + 1 :])
    with pytest.raises(ArchitectureError, match=message):
        Genotype(genes, GOOD)


def test_a_cell_has_eight_genes():
    with pytest.raises(ArchitectureError, match="reduce cell has 7 genes"):
        Genotype(GOOD, GOOD[:7])


VALUE = PUBLISHED["DARTS_V2"].to_json()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (VALUE | {"normal_concat": [3, 4, 5]}, r"normal_concat is \[3, 4, 5\]"),
        (VALUE | {"reduce_concat": [5, 4, 3, 2]}, "reduce_concat"),
        (VALUE | {"more": 1}, "exactly the fields"),
        ({"normal": VALUE["normal"]}, "exactly the fields"),
        ([1, 2], "exactly the fields"),
        (VALUE | {"normal": 3}, "is a list of genes, not 3"),
        (VALUE | {"normal": [*VALUE["normal"][:7], ["skip_connect"]]}, "a gene is an operation"),
    ],
)
def test_json_that_is_no_genotype(value, message):
    with pytest.raises(ArchitectureError, match=message):
        Genotype.from_json(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        '{"a":' * 2000,
        "Genotype",
        "Genotype(" + "[" * 4000,
        "-" * 9000 + "1",
        "__import__('os').system('touch hacked')",
        "Genotype(**{})",
        "Genotype([], [], [], [])",
        DARTS_V2_TEXT.replace("Genotype", "Genotypes"),
        DARTS_V2_TEXT.replace("[2, 3, 4, 5]", "range(2, 5)"),
        DARTS_V2_TEXT.replace("[2, 3, 4, 5]", "range(0, 1000000000000)"),
        DARTS_V2_TEXT.replace("[2, 3, 4, 5]", "list(range(2, 6))"),
        DARTS_V2_TEXT.replace("('dil_conv_3x3', 2)", "('dil_conv_3x3', 1 + 1)"),
        DARTS_V2_TEXT.replace("('dil_conv_3x3', 2)", "('dil_conv_3x3', 2.0)"),
        DARTS_V2_TEXT.replace("('dil_conv_3x3', 2)", "print(('dil_conv_3x3', 2))"),
        DARTS_V2_TEXT.replace("normal_concat", "reduce_concat"),
        DARTS_V2_TEXT + "\nprint(1)",
    ],
)
def test_text_that_is_no_genotype(text):
    with pytest.raises(ArchitectureError):
        read_genotype(text)


def test_text_has_a_size_limit():
    with pytest.raises(ArchitectureError, match="less than 10000 characters"):
        read_genotype(DARTS_V2_TEXT + " " * 10_000)


pieces = st.sampled_from(
    ["Genotype(", "normal=", "[", "]", "(", ")", "'skip_connect'", ",", "1", "range(2, 6)", "x = "]
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(pieces).map("".join)))
def test_any_text_is_a_genotype_or_an_architecture_error(text):
    with pytest.raises(ArchitectureError):
        read_genotype(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(DARTS_V2_TEXT) - 1), st.characters())
def test_altered_text_is_a_genotype_or_an_architecture_error(position, character):
    text = DARTS_V2_TEXT[:position] + character + DARTS_V2_TEXT[position + 1 :]
    try:
        genotype = read_genotype(text)
    except ArchitectureError:
        return
    assert Genotype.from_json(genotype.to_json()) == genotype


def naive_cell(weights, edge_weights):
    """Tries every pair of sources of every node instead of ranking edges."""
    genes, start = [], 0
    for node in range(2, 6):
        rows = [
            [float(w) * float(edge_weights[start + source]) for w in weights[start + source][1:]]
            for source in range(node)
        ]
        first, second = max(
            combinations(range(node), 2), key=lambda pair: sum(max(rows[s]) for s in pair)
        )
        for source in (first, second):
            best = rows[source].index(max(rows[source]))
            genes.append(Gene(OPERATIONS[1 + best], source))
        start += node
    return tuple(genes)


@pytest.mark.parametrize("with_edges", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_derive_agrees_with_trying_every_pair(seed, with_edges):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 14, 8, generator=draw).mul(2).softmax(-1)
    edges = torch.rand(2, 14, generator=draw) if with_edges else None
    factors = torch.ones(2, 14) if edges is None else edges
    expected = Genotype(*(naive_cell(weights[row], factors[row]) for row in range(2)))
    assert derive(weights, edges) == expected


def test_derive_ignores_none_and_gives_ties_to_the_first():
    weights = torch.full((2, 14, 8), 0.1)
    weights[:, :, 0] = 0.9
    expected = tuple(Gene("max_pool_3x3", source) for _ in range(4) for source in (0, 1))
    assert derive(weights) == Genotype(expected, expected)


def test_derive_reads_row_0_as_normal_and_follows_the_edge_weights():
    weights = torch.full((2, 14, 8), 0.1)
    weights[0, :, 4] = 0.5
    weights[1, :, 7] = 0.5
    edges = torch.ones(2, 14)
    edges[0, EDGES.index((4, 5))] = 2
    edges[1, EDGES.index((3, 5))] = 2
    genotype = derive(weights, edges)
    assert genotype.normal[6:] == (Gene("sep_conv_3x3", 0), Gene("sep_conv_3x3", 4))
    assert genotype.reduce[6:] == (Gene("dil_conv_5x5", 0), Gene("dil_conv_5x5", 3))


def test_derive_refuses_what_is_not_a_number_or_of_another_shape():
    weights = torch.ones(2, 14, 8)
    weights[1, 3, 3] = float("nan")
    with pytest.raises(ArchitectureError, match="not a number"):
        derive(weights)
    with pytest.raises(ArchitectureError, match=r"\(2, 14, 7\)"):
        derive(torch.ones(2, 14, 7))


def test_skip_count():
    genes = (Gene("skip_connect", 0), Gene("sep_conv_3x3", 1), Gene("skip_connect", 1))
    assert skip_count(genes) == 2

"""The discrete cell of the DARTS space: what a search finds and a network is built from."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nas.errors import ArchitectureError
from nas.ops.mixed import EDGES, OPERATIONS

INPUTS = 2  # states 0 and 1: the outputs of the two cells before
NODES = (2, 3, 4, 5)  # states that a cell computes; its output concatenates them
MAX_TEXT = 10_000  # characters; a genotype takes about 700


@dataclass(frozen=True)
class Gene:
    """One chosen edge: ``operation`` applied to state ``source``."""

    operation: str
    source: int


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell, two genes a node in the order of ``NODES``.

    The two genes of a node are kept sorted by source, so genotypes of equal networks are equal.

    Raises:
        ArchitectureError: a gene that no cell can have; the message names it.
    """

    normal: tuple[Gene, ...]
    reduce: tuple[Gene, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "normal", _canonical("normal", self.normal))
        object.__setattr__(self, "reduce", _canonical("reduce", self.reduce))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form with the field names of the reference implementation."""
        return {
            "normal": [[gene.operation, gene.source] for gene in self.normal],
            "normal_concat": list(NODES),
            "reduce": [[gene.operation, gene.source] for gene in self.reduce],
            "reduce_concat": list(NODES),
        }

    @staticmethod
    def from_json(value: Any) -> Genotype:
        """Read :meth:`to_json`'s form.

        Raises:
            ArchitectureError: a field is missing, unknown or of the wrong kind, a gene is
                impossible, or the cell's output is not the concatenation of states 2 to 5.
        """
        fields = ("normal", "normal_concat", "reduce", "reduce_concat")
        if not isinstance(value, Mapping) or set(value) != set(fields):
            raise ArchitectureError(f"a genotype has exactly the fields {', '.join(fields)}")
        for field in ("normal_concat", "reduce_concat"):
            if value[field] != list(NODES):
                raise ArchitectureError(
                    f"{field} is {value[field]!r}, but a cell of this space outputs states 2 to 5"
                )
        return Genotype(_genes("normal", value["normal"]), _genes("reduce", value["reduce"]))


def _genes(cell: str, value: Any) -> tuple[Gene, ...]:
    if not isinstance(value, list | tuple):
        raise ArchitectureError(f"the {cell} cell is a list of genes, not {value!r}")
    for gene in value:
        if not isinstance(gene, list | tuple) or len(gene) != 2:
            raise ArchitectureError(
                f"a gene is an operation and a source, not {gene!r} as in the {cell} cell"
            )
    return tuple(Gene(*gene) for gene in value)


def _canonical(cell: str, genes: Sequence[Gene]) -> tuple[Gene, ...]:
    """``genes`` checked, and sorted by source inside each node."""
    if len(genes) != 2 * len(NODES):
        raise ArchitectureError(f"the {cell} cell has {len(genes)} genes, not two for each node")
    ordered: list[Gene] = []
    for index, node in enumerate(NODES):
        pair = list(genes[2 * index : 2 * index + 2])
        for gene in pair:
            _check_gene(cell, node, gene)
        if pair[0].source == pair[1].source:
            raise ArchitectureError(
                f"node {node} of the {cell} cell takes state {pair[0].source} twice; "
                "its two sources differ"
            )
        ordered += sorted(pair, key=lambda gene: gene.source)
    return tuple(ordered)


def _check_gene(cell: str, node: int, gene: Gene) -> None:
    if gene.operation not in OPERATIONS[1:]:
        raise ArchitectureError(
            f"node {node} of the {cell} cell has operation {gene.operation!r}; "
            f"known are {', '.join(OPERATIONS[1:])}"
        )
    if type(gene.source) is not int or not 0 <= gene.source < node:
        raise ArchitectureError(
            f"node {node} of the {cell} cell takes state {gene.source!r}; "
            f"its sources are the states 0 to {node - 1}"
        )


def read_genotype(text: str) -> Genotype:
    """Read a genotype from JSON or from the text that the reference implementation prints.

    The latter looks like ``Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6),
    reduce=[...], reduce_concat=range(2, 6))``, with or without ``NAME =`` before it. It is parsed
    and compared with that form piece by piece; nothing in it is ever evaluated.

    Raises:
        ArchitectureError: the text is too long or is no genotype.
    """
    if len(text) > MAX_TEXT:
        raise ArchitectureError(
            f"a genotype takes less than {MAX_TEXT} characters, and this text has {len(text)}"
        )
    text = text.strip()
    try:
        if text.startswith("{"):
            return Genotype.from_json(json.loads(text))
        call = ast.parse(re.sub(r"^[A-Za-z_]\w*\s*=\s*", "", text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArchitectureError(f"this text is no genotype: {error}") from error
    return Genotype.from_json(_fields(call))


def _fields(call: ast.expr) -> dict[str, Any]:
    """The keyword arguments of the parsed call ``Genotype(normal=..., ...)``."""
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "Genotype"
        and not call.args
    ):
        raise ArchitectureError("this text is no genotype: it is not Genotype(normal=..., ...)")
    fields: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in fields:
            raise ArchitectureError("this text is no genotype: a field is repeated or unnamed")
        fields[keyword.arg] = _literal(keyword.value)
    return fields


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() as value):
            return value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Call(
            func=ast.Name(id="range"),
            args=[ast.Constant(value=int() as start), ast.Constant(value=int() as stop)],
            keywords=[],
        ) if 0 <= start <= stop <= NODES[-1] + 1:
            return list(range(start, stop))
    raise ArchitectureError(
        "this text is no genotype: it holds more than names, numbers, lists and range(2, 6)"
    )


def skip_count(genes: Sequence[Gene]) -> int:
    """Number of skip connections in a cell: many in the normal cell mean a collapsed search."""
    return sum(gene.operation == "skip_connect" for gene in genes)


def derive(operation_weights: Tensor, edge_weights: Tensor | None = None) -> Genotype:
    """The genotype of a searched supernet (DARTS section 2.4; PC-DARTS section 3.3).

    Each node keeps the two edges whose strongest operation other than `none` weighs most, and on
    each of them that operation. Equal weights resolve to the first edge or operation.

    Args:
        operation_weights: [2, 14, 8], mixing weights; row 0 is the normal cell, row 1 the
            reduction cell.
        edge_weights: [2, 14], factors of the edges (PC-DARTS); without them all edges count alike.

    Raises:
        ArchitectureError: a weight is not a number, or the shapes are others.
    """
    expected = (2, len(EDGES), len(OPERATIONS))
    if tuple(operation_weights.shape) != expected:
        raise ArchitectureError(
            f"operation weights have shape {expected}, not {tuple(operation_weights.shape)}"
        )
    weights = operation_weights.detach().double()
    if edge_weights is not None:
        weights = weights * edge_weights.detach().double().reshape(2, len(EDGES), 1)
    if weights.isnan().any():
        raise ArchitectureError("a weight is not a number, so no genotype can be derived")
    normal, reduce = weights.tolist()
    return Genotype(_derive_cell(normal), _derive_cell(reduce))


def _derive_cell(weights: list[list[float]]) -> tuple[Gene, ...]:
    genes: list[Gene] = []
    for node in NODES:
        candidates = []
        for (source, target), row in zip(EDGES, weights, strict=True):
            if target == node:
                best = max(range(1, len(OPERATIONS)), key=row.__getitem__)
                candidates.append((row[best], Gene(OPERATIONS[best], source)))
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: ties keep their order
        genes += [gene for _, gene in candidates[:2]]
    return tuple(genes)


_SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _published(normal: str, reduce: str) -> Genotype:
    def cell(text: str) -> tuple[Gene, ...]:
        pairs = (item.split("-") for item in text.split())
        return tuple(Gene(_SHORT[operation], int(source)) for operation, source in pairs)

    return Genotype(cell(normal), cell(reduce))


PUBLISHED = {
    "DARTS_V1": _published(
        "sep3-1 sep3-0 skip-0 sep3-1 skip-0 sep3-1 sep3-0 skip-2",
        "max-0 max-1 skip-2 max-0 max-0 skip-2 skip-2 avg-0",
    ),
    "DARTS_V2": _published(
        "sep3-0 sep3-1 sep3-0 sep3-1 sep3-1 skip-0 skip-0 dil3-2",
        "max-0 max-1 skip-2 max-1 max-0 skip-2 skip-2 max-1",
    ),
    "PDARTS": _published(
        "skip-0 dil3-1 skip-0 sep3-1 sep3-1 sep3-3 sep3-0 dil5-4",
        "avg-0 sep5-1 sep3-0 dil5-2 max-0 dil3-1 dil3-1 dil5-3",
    ),
    "PC_DARTS_CIFAR": _published(
        "sep3-1 skip-0 sep3-0 dil3-1 sep5-0 sep3-1 avg-0 dil3-1",
        "sep5-1 max-0 sep5-1 sep5-2 sep3-0 sep3-3 sep3-1 sep3-2",
    ),
    "PC_DARTS_IMAGENET": _published(
        "skip-1 sep3-0 sep3-0 skip-1 sep3-1 sep3-3 sep3-1 dil5-4",
        "sep3-0 skip-1 dil5-2 max-1 sep3-2 sep3-1 sep5-0 sep3-3",
    ),
}
"""Genotypes printed by the papers: DARTS first and second order, P-DARTS, PC-DARTS twice."""

from __future__ import annotations

import pytest
import torch

from nas.ops.packing import Packing

PACKING = Packing({"a": (2, 3), "b": (4,), "c": (1, 1)})


def test_size_counts_every_element() -> None:
    assert PACKING.size == 6 + 4 + 1
    assert Packing({}).size == 0


def test_pieces_lie_in_order() -> None:
    flat = torch.arange(11)
    pieces = PACKING.unpack(flat)
    assert pieces["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pieces["b"].tolist() == [6, 7, 8, 9]
    assert pieces["c"].tolist() == [[10]]


def test_pieces_are_views_of_the_vector() -> None:
    flat = torch.zeros(11)
    PACKING.unpack(flat)["b"][1] = 5.0
    assert flat.tolist() == [0.0] * 7 + [5.0] + [0.0] * 3


def test_leading_dimensions_stay() -> None:
    flat = torch.arange(22).view(2, 11)
    pieces = PACKING.unpack(flat)
    assert pieces["a"].shape == (2, 2, 3)
    assert pieces["b"].shape == (2, 4)
    assert pieces["b"][1].tolist() == [17, 18, 19, 20]


def test_gradients_of_the_pieces_are_assembled() -> None:
    flat = torch.zeros(11, requires_grad=True)
    pieces = PACKING.unpack(flat)
    (pieces["a"].sum() + 2 * pieces["b"][3]).backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [1.0] * 6 + [0.0, 0.0, 0.0, 2.0, 0.0]


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="split"):
        PACKING.unpack(torch.zeros(12))

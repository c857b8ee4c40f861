"""DARTS, second order: the gradient through the unrolled step, against exact ones."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from searches import double, exact, in_double, make_search, pair
from torch import Tensor

import nas.search.bilevel
import nas.search.darts
from nas.data import Batch, ImageTask
from nas.search import BilevelSearch, Method, SearchConfig
from nas.search.darts import SecondOrderDarts
from nas.spaces.darts.supernet import Mixing, Supernet, SupernetConfig


class SecondOrderPenalised(SecondOrderDarts):
    name = "second-order-penalised"

    def penalty(self, search: BilevelSearch) -> Tensor | None:
        return search.supernet.alphas.square().sum()


def prepared(
    task: ImageTask, method: str | Method = "darts-2nd", **settings: object
) -> tuple[BilevelSearch, Batch, Batch]:
    """A search in double precision that has momentum, and two batches."""
    search = in_double(make_search(task, method, **settings))
    batches = search.batches()
    search.weight_step(double(next(batches)[0]))
    train, validation = next(batches)
    return search, double(train), double(validation)


def loss(search: BilevelSearch, batch: Batch, weights: Tensor) -> Tensor:
    mixing = search.method.mixing(search.supernet)
    scores = search.supernet(batch.images, mixing, weights=weights, update_statistics=False)
    return F.cross_entropy(scores, batch.labels)


def through_the_step(search: BilevelSearch, train: Batch, validation: Batch) -> list[Tensor]:
    """The exact gradient: autograd through the step itself, twice over the (eager) network."""
    supernet, config = search.supernet, search.config
    weights = supernet.weights
    (gradient,) = torch.autograd.grad(loss(search, train, weights), [weights], create_graph=True)
    step = gradient + config.weight_decay * weights
    buffer = search.weight_optimiser.state[weights].get("momentum_buffer")
    if buffer is not None:
        step = step + config.momentum * buffer
    unrolled = weights - search.learning_rate * step
    parameters = supernet.architecture_parameters()
    return list(torch.autograd.grad(loss(search, validation, unrolled), parameters))


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    distance = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    return float((distance / sum(b.square().sum() for b in theirs)).sqrt())


@pytest.mark.parametrize(
    "supernet",
    [
        SupernetConfig(channels=2, cells=3),
        SupernetConfig(channels=4, cells=3, partial=2, edge_normalisation=True),
    ],
    ids=["alphas", "alphas and betas"],
)
def test_equals_autograd_through_the_step(
    supernet: SupernetConfig,
    backend: str,
    few_digits: ImageTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The difference is taken so finely that no ReLU changes sides between w+ and w-."""
    monkeypatch.setattr(nas.search.darts, "PERTURBATION", 1e-7)
    settings = {"supernet": supernet, "weight_decay": 0.01}
    expected = through_the_step(*prepared(few_digits, backend="eager", **settings))
    search, train, validation = prepared(few_digits, backend=backend, **settings)
    ours = search.method.architecture_gradients(search, train, validation)
    assert relative_error(ours, expected) < 1e-6
    first = Method().architecture_gradients(search, train, validation)
    assert relative_error(first, expected) > 0.1  # so there was something to get right


def test_equals_the_formula_of_the_paper(few_digits: ImageTask) -> None:
    """With the paper's epsilon, computed on copies whose weights are really overwritten."""
    search, train, validation = prepared(few_digits, weight_decay=0.01)
    rate = search.learning_rate

    def with_weights(value: Tensor) -> Supernet:
        twin = copy.deepcopy(search.supernet)
        with torch.no_grad():
            twin.weights.copy_(value)
        return twin

    def gradients(twin: Supernet, batch: Batch) -> tuple[Tensor, ...]:
        scores = twin(batch.images, search.method.mixing(twin))
        return torch.autograd.grad(
            F.cross_entropy(scores, batch.labels), [twin.alphas, twin.weights]
        )

    # w' by torch's own optimiser, on a copy that has the momentum
    twin = with_weights(search.supernet.weights)
    optimiser = torch.optim.SGD([twin.weights], lr=rate, momentum=0.9, weight_decay=0.01)
    buffer = search.weight_optimiser.state[search.supernet.weights]["momentum_buffer"]
    optimiser.state[twin.weights]["momentum_buffer"] = buffer.clone()
    twin.weights.grad = gradients(twin, train)[1]
    optimiser.step()

    outer, direction = gradients(twin, validation)
    epsilon = 0.01 / direction.norm()
    plus = gradients(with_weights(search.supernet.weights + epsilon * direction), train)[0]
    minus = gradients(with_weights(search.supernet.weights - epsilon * direction), train)[0]
    expected = outer - rate * (plus - minus) / (2 * epsilon)
    (ours,) = search.method.architecture_gradients(search, train, validation)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def test_the_first_step_has_no_momentum(few_digits: ImageTask) -> None:
    search = in_double(make_search(few_digits, "darts-2nd", weight_decay=0.01))
    train, _ = pair(search)
    ours = SecondOrderDarts()._unrolled_weights(search, train)
    weights = search.supernet.weights
    (gradient,) = torch.autograd.grad(loss(search, train, weights), [weights])
    expected = weights - 0.1 * (gradient + 0.01 * weights)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-10, atol=1e-12)
    assert ours.is_leaf
    assert ours.requires_grad


def test_rate_zero_is_first_order(few_digits: ImageTask) -> None:
    rates = {"learning_rate": 0.0, "learning_rate_end": 0.0}
    search, train, validation = prepared(few_digits, **rates)
    ours = search.method.architecture_gradients(search, train, validation)
    first = Method().architecture_gradients(search, train, validation)
    assert relative_error(ours, first) < 1e-12


def test_penalty_counts_once(few_digits: ImageTask) -> None:
    plain, train, validation = prepared(few_digits)
    (without,) = plain.method.architecture_gradients(plain, train, validation)
    (with_it,) = SecondOrderPenalised().architecture_gradients(plain, train, validation)
    expected = without + 2 * plain.supernet.alphas.detach()
    # running statistics moved in between, but batches are normalised by their own
    torch.testing.assert_close(with_it, expected, rtol=1e-9, atol=1e-12)


def test_weights_and_optimiser_keep_every_bit(few_digits: ImageTask) -> None:
    search, train, validation = prepared(few_digits)
    before = {name: exact(tensor) for name, tensor in search.tensors().items()}
    gradient = search.supernet.weights.grad
    search.method.architecture_gradients(search, train, validation)
    after = {name: exact(tensor) for name, tensor in search.tensors().items()}
    changed = {name for name in before if before[name] != after[name]}
    # only the pass at the supernet's own weights counts in the running statistics
    assert changed == {"supernet.running_mean", "supernet.running_variance"}
    assert search.supernet.weights.grad is gradient


def test_the_unrolled_twin_leaves_no_statistics(
    few_digits: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, train, validation = prepared(few_digits)
    passes: list[tuple[bool, bool]] = []
    original = search.loss

    def watched(batch: Batch, *arguments: Any, update_statistics: bool = True) -> Tensor:
        passes.append((batch is validation, update_statistics))
        return original(batch, *arguments, update_statistics=update_statistics)

    monkeypatch.setattr(search, "loss", watched)
    search.method.architecture_gradients(search, train, validation)
    assert passes == [(False, True), (True, False), (False, False), (False, False)]


# ---- a toy whose gradient is known: w and a are single numbers ----


class Toy(SecondOrderDarts):
    """L_train = (w - a)^2, L_val = (w - goal)^2 + a^2 / 2."""

    def mixing(self, supernet: Any) -> Mixing:
        return Mixing(supernet.alphas)


def toy(goal: float, *, momentum_buffer: float | None = None) -> Any:
    supernet = SimpleNamespace(
        weights=torch.tensor([0.7], dtype=torch.float64, requires_grad=True),
        alphas=torch.tensor([0.2], dtype=torch.float64, requires_grad=True),
    )
    supernet.architecture_parameters = lambda: [supernet.alphas]

    def loss(
        batch: str, mixing: Mixing, weights: Tensor, *, update_statistics: bool = True
    ) -> Tensor:
        if batch == "train":
            return (weights - mixing.operations).square().sum()
        return ((weights - goal).square() + mixing.operations.square() / 2).sum()

    state = {} if momentum_buffer is None else {"momentum_buffer": torch.tensor([momentum_buffer])}
    return SimpleNamespace(
        supernet=supernet,
        loss=loss,
        learning_rate=0.1,
        config=SearchConfig(momentum=0.9, weight_decay=0.05),
        weight_optimiser=SimpleNamespace(state={supernet.weights: state}),
    )


@pytest.mark.parametrize("momentum_buffer", [None, 0.3])
def test_two_numbers_by_hand(momentum_buffer: float | None) -> None:
    search = toy(1.0, momentum_buffer=momentum_buffer)
    w, a, eta = 0.7, 0.2, 0.1
    unrolled = w - eta * (2 * (w - a) + 0.05 * w + 0.9 * (momentum_buffer or 0.0))
    # dw'/da = 2 eta, so dL_val(w'(a), a)/da = a + 2 (w' - 1) 2 eta
    expected = a + 4 * eta * (unrolled - 1.0)
    (ours,) = Toy().architecture_gradients(search, "train", "validation")  # type: ignore[arg-type]
    assert ours.item() == pytest.approx(expected, rel=1e-7)


def test_a_validation_loss_at_its_minimum_has_no_second_order_term() -> None:
    """The direction is exactly zero, and its norm is divided by."""
    search = toy(0.0)
    goal = Toy()._unrolled_weights(search, "train").item()  # type: ignore[arg-type]
    (ours,) = Toy().architecture_gradients(toy(goal), "train", "validation")  # type: ignore[arg-type]
    assert ours.item() == pytest.approx(0.2, rel=1e-12)

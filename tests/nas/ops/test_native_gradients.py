"""Gradients of the native cell by finite differences, on ties, and only where asked for; and what
PyTorch demands of an operator: schemas, fake tensors, compilation without a graph break."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from native_cells import INPUTS, assert_close, draw_call, recorded, run
from torch import Tensor

from nas.data import TaskShape
from nas.errors import NativeError
from nas.ops import mixed, native
from nas.ops.mixed import CellPlan, Statistics
from nas.search import METHODS
from nas.spaces.darts.supernet import Supernet, SupernetConfig

pytestmark = pytest.mark.usefixtures("native")

PLANS = {
    "full": CellPlan(3, 2, 2, 1, reduction=False, previous_reduction=False),
    "reduction": CellPlan(2, 3, 2, 1, reduction=True, previous_reduction=False),
    "partial": CellPlan(2, 3, 4, 2, reduction=False, previous_reduction=True),
    "partial-reduction": CellPlan(3, 2, 4, 2, reduction=True, previous_reduction=True),
}
WIDER = CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=True)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_finite_differences(plan: CellPlan, training: bool) -> None:
    call = draw_call(plan, 2, (3, 4), training=training, edges=True, seed=1)
    values = [getattr(call, name).requires_grad_() for name in INPUTS]

    def cell(before: Tensor, previous: Tensor, weights: Tensor, *mixing: Tensor) -> Tensor:
        statistics = Statistics(call.mean, call.variance, training, update=False)
        mixing = tuple(value.unsqueeze(0) for value in mixing)
        return native.mixed_cells([plan], before, previous, weights, statistics, *mixing)

    torch.autograd.gradcheck(cell, values, fast_mode=True)
    mixing = values[3:]
    fixed = [value.detach() for value in values[:3]]
    torch.autograd.gradcheck(lambda *mixing: cell(*fixed, *mixing), mixing)  # every entry


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("training", [True, False])
def test_ties_of_max_pooling_go_where_eager_sends_them(plan: CellPlan, training: bool) -> None:
    """States of a few equal numbers: each window has several largest pixels."""
    call = draw_call(plan, 6, (9, 8), training=training, edges=True, choice="nothing")
    active = call.active.clone()  # type: ignore[union-attr]
    active[[0, 1, 4], 1] = True  # both inputs to node 2, and node 2 to node 3
    call = replace(
        call,
        active=active,
        operations=active.double(),
        before=call.before.sign(),
        previous=call.previous.sign(),
        mean=torch.zeros_like(call.mean),
        weights=call.weights.sign(),
    )
    assert_close(run(native.mixed_cells, call), run(mixed.mixed_cells, call))


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_images(value: float) -> None:
    """All windows tie, in evaluation mode, where a normalisation does not make noise of them."""
    for plan in PLANS.values():
        call = draw_call(plan, 2, (5, 6), training=False, edges=True)
        call.before.fill_(value)
        call.previous.fill_(value)
        call.mean.zero_()
        call.variance.fill_(1)
        assert_close(run(native.mixed_cells, call), run(mixed.mixed_cells, call))


# ---- only what is asked for ----


@pytest.mark.parametrize(
    "needed",
    [("operations", "edges"), ("weights",), ("before", "previous"), ("previous",), ("edges",)],
    ids="+".join,
)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_nobody_asks_for_are_not_computed(
    needed: tuple[str, ...], training: bool
) -> None:
    """And the others have the same bits as if all were."""
    call = draw_call(WIDER, 3, training=training, edges=True)
    whole, part = run(native.mixed_cells, call), run(native.mixed_cells, call, needed=needed)
    assert set(part) & set(INPUTS) == set(needed)
    assert all(torch.equal(part[name], whole[name]) for name in part)

    operator, arguments = recorded(call, needed)[1]
    wanted = {
        "before": "before" in needed,
        "previous": "previous" in needed,
        "weights": "weights" in needed,
        "mixing": bool({"operations", "edges"} & set(needed)),
    }
    assert {name: arguments[f"need_{name}"] for name in wanted} == wanted
    before, previous, weights, operations, bypass = operator(**arguments)
    for gradient, name in (
        (before, "before"),
        (previous, "previous"),
        (weights, "weights"),
        (operations, "mixing"),
        (bypass, "mixing"),
    ):
        assert bool(gradient.numel()) == wanted[name]


def test_nothing_asked_for_runs_no_backward_pass() -> None:
    assert len(recorded(draw_call(WIDER), needed=())) == 1


def test_second_derivatives_are_refused() -> None:
    """Rather than wrong: the kernels' backward pass has no derivative of its own."""
    call = draw_call(PLANS["full"])
    statistics = Statistics(call.mean, call.variance, training=True)
    operations = call.operations.requires_grad_()
    output = native.mixed_cells(
        [call.plan],
        *(call.before, call.previous, call.weights, statistics, operations.unsqueeze(0)),
    )
    (gradient,) = torch.autograd.grad(output.square().sum(), operations, create_graph=True)
    with pytest.raises(NativeError, match=r"first derivatives only.*backend 'eager'"):
        gradient.square().sum().backward()


# ---- a good citizen of PyTorch ----


@pytest.mark.parametrize("plan", [PLANS["full"], WIDER], ids=["full", "partial"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("choice", ["all", "some"])
def test_operators_are_registered_as_pytorch_wants(
    plan: CellPlan, training: bool, choice: str
) -> None:
    call = draw_call(plan, 2, (4, 3), training=training, edges=True, choice=choice)
    for needed in (INPUTS, ("operations",)):
        (forward, arguments), (backward, others) = recorded(call, needed)
        for name in set(needed) & arguments.keys():
            arguments[name].requires_grad_()
        torch.library.opcheck(forward, (), arguments)
        torch.library.opcheck(backward, (), others)


@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(partial: int, training: bool) -> None:
    """Forward, backward and running statistics, in one graph each."""
    config = SupernetConfig(channels=4, cells=3, partial=partial, edge_normalisation=partial > 1)
    method = METHODS["darts"]

    def make(backend: str) -> Supernet:
        supernet = Supernet(TaskShape(2, 6, 5, 3), config, seed=0, backend=backend)
        return supernet.double().train(training)

    compiled, eager = make("native"), make("eager")
    scores = torch.compile(
        lambda images: compiled(images, method.mixing(compiled)),
        fullgraph=True,
        backend="aot_eager",
    )
    for seed in range(2):  # the second call runs what the first one compiled
        images = draw_images(seed)
        got, expected = scores(images), eager(images, method.mixing(eager))
        got.square().sum().backward()
        expected.square().sum().backward()
        assert_close({"scores": got.detach()}, {"scores": expected.detach()})
    assert_close(gradients(compiled), gradients(eager))
    assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))


def draw_images(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 6, 5, generator=draw, dtype=torch.float64)


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    assert found.keys() == dict(supernet.named_parameters()).keys()
    return found

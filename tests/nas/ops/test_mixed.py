"""The mixed cell, operation by operation, against modules and against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference_supernet import NAMES, MixedOp, build, norm
from torch import Tensor, nn

from nas.ops import mixed
from nas.ops.mixed import (
    EDGES,
    OPERATIONS,
    CellPlan,
    Normaliser,
    Statistics,
    mixed_cell,
    shuffle_channels,
)
from nas.ops.primitives import FactorizedReduce
from nas.randomness import generator

CLOSE = {"rtol": 0.0, "atol": 1e-12}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=generator(seed, "test"), dtype=torch.float64)


class OneCell:
    """A cell with random weights, fresh statistics and inputs of 5x7 pixels."""

    def __init__(self, *, partial: int = 1, reduction: bool = False, channels: int = 4) -> None:
        self.plan = CellPlan(3, 6, channels, partial, reduction, previous_reduction=False)
        self.flat = draw(self.plan.weights.size, seed=1).requires_grad_()
        self.weights = self.plan.weights.unpack(self.flat)
        self.inputs = draw(2, 3, 5, 7, seed=2), draw(2, 6, 5, 7, seed=3)
        size = self.plan.statistics.size
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.variance = torch.ones(size, dtype=torch.float64)

    def __call__(
        self, operations: Tensor, edges: Tensor | None = None, active: Tensor | None = None
    ) -> Tensor:
        statistics = Statistics(self.mean, self.variance, training=True)
        return mixed_cell(self.plan, *self.inputs, self.flat, statistics, operations, edges, active)

    def states(self) -> list[Tensor]:
        """The two preprocessed inputs, by modules."""
        made = []
        for x, name in zip(self.inputs, ("preprocess0", "preprocess1"), strict=True):
            matrix = self.weights[name].detach()
            made.append(F.batch_norm(
                F.conv2d(F.relu(x), matrix.t()[:, :, None, None]), None, None, training=True
            ))  # fmt: skip
        return made

    def node(self, output: Tensor, node: int) -> Tensor:
        return output[:, (node - 2) * self.plan.channels : (node - 1) * self.plan.channels]

    def module(self, edge: int, operation: int) -> nn.Module:
        """The operation of that edge as modules with the cell's weights."""
        plan, stride = self.plan, 2 if self.plan.reduction and EDGES[edge][0] < 2 else 1
        module = build(NAMES[operation], plan.mixed, stride).double()
        slots = {4: (("depthwise3", 0, 0), ("depthwise3", 1, 1)), 6: (("depthwise3", 2, 4),)}
        slots |= {5: (("depthwise5", 0, 2), ("depthwise5", 1, 3)), 7: (("depthwise5", 2, 5),)}
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        values: list[Tensor] = []
        for table, stage, slot in slots.get(operation, ()):
            values.append(self.weights[table][edge, stage].permute(2, 0, 1)[:, None])
            values.append(self.weights["pointwise"][edge, slot].t()[:, :, None, None])
        if operation == 3 and stride == 2:
            reducing = [e for e, (source, _) in enumerate(EDGES) if source < 2]
            matrix = self.weights["reduce"][reducing.index(edge)].t()[:, :, None, None]
            values += matrix.split(plan.mixed // 2)
        with torch.no_grad():
            for convolution, value in zip(convolutions, values, strict=True):
                convolution.weight.copy_(value)
        return module


def one_hot(edge: int, operation: int) -> Tensor:
    weights = torch.zeros(14, 8, dtype=torch.float64)
    weights[edge, operation] = 1
    return weights


def test_operations_and_edges_are_those_of_the_paper() -> None:
    assert OPERATIONS == NAMES
    assert EDGES == (
        (0, 2), (1, 2),
        (0, 3), (1, 3), (2, 3),
        (0, 4), (1, 4), (2, 4), (3, 4),
        (0, 5), (1, 5), (2, 5), (3, 5), (4, 5),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("operation", range(1, 8), ids=OPERATIONS[1:])
def test_one_hot_is_the_operation_alone(operation: int, reduction: bool) -> None:
    """On both edges into the first node, and on an edge between nodes."""
    cell = OneCell(reduction=reduction)
    states = cell.states()
    for edge in (0, 1):
        node = cell.node(cell(one_hot(edge, operation)), 2)
        torch.testing.assert_close(node, cell.module(edge, operation)(states[edge]), **CLOSE)
    weights = one_hot(0, operation) + one_hot(4, operation)  # state 0 -> node 2 -> node 3
    output = cell(weights)
    expected = cell.module(4, operation)(cell.node(output, 2))
    torch.testing.assert_close(cell.node(output, 3), expected, **CLOSE)


def test_large_logits_choose_one_operation() -> None:
    logits = torch.full((14, 8), 0.0, dtype=torch.float64)
    logits[:, 4] = 200.0
    chosen = one_hot(0, 4) + sum(one_hot(edge, 4) for edge in range(1, 14))
    cell = OneCell()
    torch.testing.assert_close(cell(logits.softmax(-1)), cell(chosen), **CLOSE)


def test_none_gives_zeros() -> None:
    weights = torch.zeros(14, 8, dtype=torch.float64)
    weights[:, 0] = 1
    for reduction, size in ((False, (5, 7)), (True, (3, 4))):
        output = OneCell(reduction=reduction)(weights)
        assert output.shape == (2, 16, *size)
        assert not output.any()


# ---- active ----


@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("reduction", [False, True])
def test_inactive_operations_are_as_if_their_weight_were_zero(
    partial: int, reduction: bool
) -> None:
    weights = draw(14, 8).abs()
    active = draw(14, 8, seed=5) > 0.3
    edges = draw(14, seed=6).abs()
    skipping, zeroed = (OneCell(partial=partial, reduction=reduction) for _ in range(2))
    expected = zeroed(weights * active, edges)
    torch.testing.assert_close(skipping(weights, edges, active), expected, **CLOSE)


def test_inactive_operations_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"depthwise": 0, "max_pool2d": 0, "avg_pool2d": 0}

    def counted(module: object, name: str) -> None:
        original = getattr(module, name)

        def count(*arguments: object, **options: object) -> Tensor:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, count)

    counted(mixed, "depthwise")
    counted(F, "max_pool2d")
    counted(F, "avg_pool2d")
    weights = torch.full((14, 8), 0.125, dtype=torch.float64)
    cell = OneCell()
    cell(weights)
    # six depthwise convolutions an edge; the pools of a state are shared by all its edges
    assert counts == {"depthwise": 14 * 6, "max_pool2d": 5, "avg_pool2d": 5}

    counts.update(dict.fromkeys(counts, 0))
    active = torch.zeros(14, 8, dtype=torch.bool)
    active[0, 4] = active[4, 6] = active[2, 1] = active[5, 1] = True
    before = cell.mean.clone()
    cell(weights, active=active)
    assert counts == {"depthwise": 3, "max_pool2d": 1, "avg_pool2d": 0}
    touched = cell.plan.statistics.unpack(cell.mean != before)
    assert touched["convolutions"].any(-1).nonzero().tolist() == [[0, 0], [0, 1], [4, 4]]
    assert touched["pools"].any(-1).nonzero().tolist() == [[0, 0]]


# ---- partial channels ----


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (8, 2), (6, 3), (4, 4), (4, 1)])
def test_shuffle_is_a_permutation_with_an_inverse(channels: int, groups: int) -> None:
    x = torch.arange(channels, dtype=torch.float64).view(1, channels, 1, 1).expand(2, -1, 3, 5)
    shuffled = shuffle_channels(x.contiguous(), groups)
    order = shuffled[0, :, 0, 0].long().tolist()
    assert sorted(order) == list(range(channels))
    each = channels // groups
    for group in range(groups):
        for place in range(each):
            assert order[place * groups + group] == group * each + place
    assert torch.equal(shuffle_channels(shuffled, each), x)


@pytest.mark.parametrize("partial", [2, 4])
def test_bypassing_channels_are_unchanged_at_stride_one(partial: int) -> None:
    cell = OneCell(partial=partial, channels=8)
    seen = 8 // partial
    states = cell.states()
    edges = torch.zeros(14, dtype=torch.float64)
    edges[1] = 1  # state 1 -> node 2
    node = cell.node(cell(one_hot(1, 3), edges), 2)
    unshuffled = shuffle_channels(node, seen)
    torch.testing.assert_close(unshuffled[:, seen:], states[1][:, seen:], **CLOSE)
    torch.testing.assert_close(unshuffled[:, :seen], states[1][:, :seen], **CLOSE)


@pytest.mark.parametrize("partial", [2, 4])
def test_bypassing_channels_are_pooled_at_stride_two(partial: int) -> None:
    cell = OneCell(partial=partial, channels=8, reduction=True)
    seen = 8 // partial
    edges = torch.zeros(14, dtype=torch.float64)
    edges[0] = 0.5
    node = cell.node(cell(one_hot(0, 0), edges), 2)
    rest = cell.states()[0][:, seen:]
    pooled = torch.stack([
        torch.stack([
            rest[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].amax((2, 3)) for x in range(4)
        ], -1) for y in range(3)
    ], -2)  # fmt: skip
    torch.testing.assert_close(shuffle_channels(node, seen)[:, seen:], 0.5 * pooled, **CLOSE)


@pytest.mark.parametrize("reduction", [False, True])
def test_an_edge_equals_the_partial_channel_module(reduction: bool) -> None:
    cell = OneCell(partial=2, channels=4, reduction=reduction)
    module = MixedOp(4, 2 if reduction else 1, 2).double()
    for operation in range(1, 8):
        module.ops[operation] = cell.module(1, operation)
    weights = draw(14, 8).abs()
    edges = torch.zeros(14, dtype=torch.float64)
    edges[1] = 0.7
    node = cell.node(cell(weights, edges), 2)
    expected = 0.7 * module(cell.states()[1], weights[1], None)
    torch.testing.assert_close(node, expected, **CLOSE)


# ---- the pieces ----


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (5, 4), (1, 1), (2, 1)])
def test_factorized_reduce_equals_the_module(size: tuple[int, int]) -> None:
    module = FactorizedReduce(3, 5).double()
    matrix = draw(3, 5)
    with torch.no_grad():
        module.conv1.weight.copy_(matrix[:, :2].t()[:, :, None, None])
        module.conv2.weight.copy_(matrix[:, 2:].t()[:, :, None, None])
    module.eval()  # fresh statistics: divides by sqrt(1 + eps) and nothing else
    x = draw(2, 3, *size)
    ours = mixed.factorized_reduce(F.relu(x), matrix) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(ours, module(x), **CLOSE)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_a_sum_over_taps(kernel: int, dilation: int, stride: int) -> None:
    x, taps = draw(1, 2, 5, 6), draw(kernel, kernel, 2)
    ours = mixed.depthwise(x, taps, stride, dilation)
    reach = dilation * (kernel // 2)
    padded = F.pad(x, (reach,) * 4)
    expected = torch.zeros_like(x)
    for row in range(kernel):
        for column in range(kernel):
            top, left = dilation * row, dilation * column
            expected += padded[:, :, top : top + 5, left : left + 6] * taps[row, column].view(
                2, 1, 1
            )
    torch.testing.assert_close(ours, expected[:, :, ::stride, ::stride], **CLOSE)


def test_pointwise_mixes_channels_and_nothing_else() -> None:
    x, matrix = draw(2, 3, 4, 5), draw(3, 6)
    expected = torch.einsum("nchw,co->nohw", x, matrix)
    torch.testing.assert_close(mixed.pointwise(x, matrix), expected, **CLOSE)


def test_normaliser_follows_torch() -> None:
    x = 3 + 2 * draw(4, 3, 2, 2)
    module = norm(3).double()
    mean, variance = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    tables = {"mean": {"t": mean}, "variance": {"t": variance}}
    training = Normaliser(tables["mean"], tables["variance"], training=True)
    torch.testing.assert_close(training(x, "t", 1), module(x), **CLOSE)
    torch.testing.assert_close(mean[1], module.running_mean, **CLOSE)
    torch.testing.assert_close(variance[1], module.running_var, **CLOSE)
    assert torch.equal(mean[0], torch.zeros(3).double())  # the other row is another's

    evaluation = Normaliser(tables["mean"], tables["variance"], training=False)
    torch.testing.assert_close(evaluation(x, "t", 1), module.eval()(x), **CLOSE)
    quiet = Normaliser(tables["mean"], tables["variance"], training=True, update=False)
    before = mean.clone()
    torch.testing.assert_close(quiet(x, "t", 1), norm(3).double()(x), **CLOSE)
    assert torch.equal(mean, before)


def test_inputs_are_not_changed() -> None:
    cell = OneCell()
    before = [x.clone() for x in cell.inputs]
    cell(torch.full((14, 8), 0.125, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(x, old) for x, old in zip(cell.inputs, before, strict=True))
    assert cell.flat.grad is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_is_channels_last_and_does_not_depend_on_the_layout(
    layout: torch.memory_format,
) -> None:
    weights = torch.full((14, 8), 0.125, dtype=torch.float64)
    cell, other = OneCell(partial=2), OneCell(partial=2)
    other.inputs = tuple(x.contiguous(memory_format=layout) for x in cell.inputs)
    output = other(weights)
    torch.testing.assert_close(output, cell(weights), **CLOSE)
    assert output.is_contiguous(memory_format=torch.channels_last)

"""Several cells in one call: as eager has them, and as cells called one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from native_cells import assert_close, same_bits
from native_chains import CHAINS, draw_inputs, run
from torch import Tensor

from nas.ops import mixed, native
from nas.ops.mixed import CellPlan, Statistics
from nas.randomness import generator

pytestmark = pytest.mark.usefixtures("native")

TWINS = (native.mixed_cells, mixed.mixed_cells)
chains = pytest.mark.parametrize("plans", CHAINS.values(), ids=CHAINS)


def one_by_one(
    plans: Sequence[CellPlan],
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """The native cells, each by a call of its own; autograd puts their gradients together."""
    of_weights = iter(weights.split([plan.weights.size for plan in plans]))
    sizes = [plan.statistics.size for plan in plans]
    means, variances = (iter(x.split(sizes)) for x in (statistics.mean, statistics.variance))
    for i, plan in enumerate(plans):
        own = Statistics(next(means), next(variances), statistics.training, statistics.update)
        assert edges is not None
        output = native.mixed_cells(
            [plan],
            *(before_previous, previous, next(of_weights), own),
            *(operations[i : i + 1], edges[i : i + 1]),
            None if active is None else active[i : i + 1],
        )
        before_previous, previous = previous, output
    return previous


@chains
@pytest.mark.parametrize("training", [True, False])
def test_a_chain_is_that_of_eager(plans: list[CellPlan], training: bool) -> None:
    inputs = draw_inputs(plans)
    assert_close(*(run(twin, plans, inputs, training=training) for twin in TWINS))


@chains
def test_cells_of_a_chain_have_their_own_operations(plans: list[CellPlan]) -> None:
    inputs = draw_inputs(plans)
    draw = generator(1, "test", "chain")
    active = torch.rand(inputs["operations"].shape, generator=draw) < 0.4
    inputs["operations"] *= active
    assert_close(*(run(twin, plans, inputs, active=active) for twin in TWINS))


@chains
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_has_the_bits_of_its_cells(plans: list[CellPlan], dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in draw_inputs(plans).items()}
    assert same_bits(run(native.mixed_cells, plans, inputs), run(one_by_one, plans, inputs))


@chains
@pytest.mark.parametrize(
    "needed", [(), ("operations",), ("weights",), ("previous",), ("before",)], ids=str
)
def test_what_is_asked_for_has_the_same_bits_alone(
    plans: list[CellPlan], needed: Sequence[str]
) -> None:
    """And without a backward pass nothing is kept, in rooms that cells use in turn."""
    inputs = draw_inputs(plans)
    whole = run(native.mixed_cells, plans, inputs)
    part = run(native.mixed_cells, plans, inputs, needed=needed)
    assert part.keys() == {"output", "mean", "variance", *needed}
    assert same_bits(part, {name: whole[name] for name in part})


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_matter() -> None:
    plans = CHAINS["network"]
    inputs = draw_inputs(plans)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(native.mixed_cells, plans, inputs))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_bfloat16_chains_agree_with_eager_ones() -> None:
    """In evaluation, where rounding does not grow by normalising noise: most outputs are equal."""
    plans = CHAINS["network"]
    inputs = {name: x.float() for name, x in draw_inputs(plans).items()}
    for name in ("before", "previous"):
        inputs[name] = inputs[name].bfloat16()
    ours, theirs = (run(twin, plans, inputs, training=False, needed=()) for twin in TWINS)
    assert ours["output"].dtype == torch.bfloat16
    same = (ours["output"] == theirs["output"]).float().mean()
    assert same > 0.9, float(same)

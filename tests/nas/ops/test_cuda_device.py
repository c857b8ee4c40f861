"""The CUDA kernels on a GPU, against the eager cell on the CPU (make gpu-check)."""

from __future__ import annotations

from dataclasses import replace

import native_chains
import native_stems
import pytest
import torch
from hypothesis import given, settings
from native_cells import INPUTS, Call, assert_close, calls, draw_call, error, run, same_bits
from torch import Tensor

from benchmarks.gpu_steps import noise
from nas.errors import ConfigurationError
from nas.ops import mixed, native, stem
from nas.ops.backend import choose
from nas.ops.mixed import CellPlan
from nas.search import METHODS, BilevelSearch, SearchConfig
from nas.spaces.darts.supernet import SupernetConfig

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)

PLANS = {
    "darts": CellPlan(48, 64, 16, 1, reduction=False, previous_reduction=False),
    "reduction": CellPlan(64, 64, 32, 1, reduction=True, previous_reduction=True),
    "pcdarts": CellPlan(48, 64, 16, 4, reduction=False, previous_reduction=False),
    "odd": CellPlan(5, 6, 12, 2, reduction=True, previous_reduction=True),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    try:
        choose("native", torch.device("cuda"))
    except ConfigurationError as refused:
        pytest.skip(str(refused))


def on_gpu(call: Call, device: torch.device = GPU) -> Call:
    tensors = {
        name: value.to(device)
        for name, value in vars(call).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return replace(call, **tensors)


def run_on_gpu(call: Call) -> dict[str, Tensor]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        return {name: x.cpu() for name, x in run(native.mixed_cells, on_gpu(call)).items()}
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=calls())
def test_device_equals_eager_for_any_shape(call: Call) -> None:
    assert_close(run_on_gpu(call), run(mixed.mixed_cells, call))


@plans
@pytest.mark.parametrize("training", [True, False])
def test_device_equals_eager(plan: CellPlan, training: bool) -> None:
    call = draw_call(plan, 8, (32, 32), training=training, edges=plan.partial > 1)
    assert_close(run_on_gpu(call), run(mixed.mixed_cells, call))


def test_device_cells_of_a_chain_equal_eager() -> None:
    plans = native_chains.CHAINS["network"]
    inputs = native_chains.draw_inputs(plans, size=(16, 12))
    on_device = {name: x.to(GPU) for name, x in inputs.items()}
    ours = native_chains.run(native.mixed_cells, plans, on_device)
    theirs = native_chains.run(mixed.mixed_cells, plans, inputs)
    assert_close({name: x.cpu() for name, x in ours.items()}, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_device_stem_equals_eager(training: bool) -> None:
    values = native_stems.draw(32, 3, 48, (32, 32))
    on_device = {name: x.to(GPU) for name, x in values.items()}
    ours = native_stems.run(native.stem, on_device, training=training)
    theirs = native_stems.run(stem.stem, values, training=training)
    assert_close({name: x.cpu() for name, x in ours.items()}, theirs)


@plans
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-4), (torch.bfloat16, 0.1), (torch.float16, 0.03)],
    ids=["float", "bf16", "half"],
)
def test_device_narrow_numbers(plan: CellPlan, dtype: torch.dtype, tolerance: float) -> None:
    call = draw_call(plan, 8, (16, 16), edges=plan.partial > 1).to(torch.float32)
    images = {name: getattr(call, name).to(dtype) for name in ("before", "previous", "gradient")}
    call = replace(call, **images)
    ours, exact = run_on_gpu(call), run(mixed.mixed_cells, call.to(torch.float64))
    assert error(ours["output"].double(), exact["output"]) <= tolerance
    for name in INPUTS:
        if name in exact:
            distance = (ours[name].double() - exact[name]).norm() / exact[name].norm()
            assert distance <= 10 * tolerance, name


@plans
def test_device_tensor_cores(plan: CellPlan) -> None:
    """Factors rounded by 2^-12 of their size, of which some ten follow one another."""
    call = draw_call(plan, 8, (16, 16), edges=plan.partial > 1).to(torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ours = run_on_gpu(call)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = run(mixed.mixed_cells, call.to(torch.float64))
    assert error(ours["output"].double(), exact["output"]) <= 0.03
    for name in INPUTS:
        if name in exact:
            distance = (ours[name].double() - exact[name]).norm() / exact[name].norm()
            assert distance <= 0.3, name
    assert not same_bits(ours, run_on_gpu(call))


@plans
def test_device_bits_repeat(plan: CellPlan) -> None:
    call = draw_call(plan, 8, (16, 16), edges=True).to(torch.float32)
    assert same_bits(run_on_gpu(call), run_on_gpu(call))


def test_device_graph_replays_the_same_bits() -> None:
    call = on_gpu(draw_call(PLANS["darts"], 8, (16, 16)).to(torch.float32))
    expected = run(native.mixed_cells, call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(native.mixed_cells, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(native.mixed_cells, call)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, expected)


def test_device_streams_are_respected() -> None:
    """What is queued before on the same stream is done before: there are no numbers without it."""
    call = on_gpu(draw_call(PLANS["pcdarts"], 8, (16, 16), edges=True).to(torch.float32))
    expected = run(native.mixed_cells, call)
    late = call.before.clone()
    call.before.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # clock cycles
        call.before.copy_(late)
        found = run(native.mixed_cells, call)
    torch.cuda.synchronize()
    assert same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
def test_device_need_not_be_the_current_one() -> None:
    call = draw_call(PLANS["darts"], 4, (16, 16)).to(torch.float32)
    found = []
    for number in range(2):
        results = run(native.mixed_cells, on_gpu(call, torch.device("cuda", number)))
        assert all(value.device.index == number for value in results.values())
        found.append({name: value.cpu() for name, value in results.items()})
    assert torch.cuda.current_device() == 0
    assert same_bits(*found)


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_device_search_that_replays_goes_where_one_goes_that_does_not(method: str) -> None:
    """By the rounding of a few steps: sums of PyTorch's own kernels may change their order."""
    partial = 2 if method == "pcdarts" else 1
    config = SearchConfig(
        SupernetConfig(4, 3, partial, edge_normalisation=partial > 1), epochs=2, batch_size=8
    )
    results = {}
    for graphs in ("auto", "off"):
        search = BilevelSearch(
            noise(96, 8, 3),
            METHODS[method],
            config,
            seed=0,
            device=torch.device("cuda"),
            backend="native",
            cuda_graphs=graphs,
        )
        assert search.graphs.used == (graphs == "auto")
        results[graphs] = search.run().supernet.state_dict()
    for name, value in results["off"].items():
        torch.testing.assert_close(results["auto"][name], value, rtol=1e-3, atol=1e-4, msg=name)

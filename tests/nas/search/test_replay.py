"""Replaying steps: what is captured when, and a search that replays equals one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from device_copies import META, DeviceCopies
from torch import Tensor

from nas.data import ImageTask, batches
from nas.errors import UnknownNameError
from nas.search import METHODS
from nas.search.bilevel import BilevelSearch
from nas.search.method import SearchConfig
from nas.search.replay import WARMUPS, Replayed, capture_graph, choose_graphs
from nas.spaces.darts.supernet import Mixing, SupernetConfig

Outputs = tuple[Tensor, ...]
CPU = torch.device("cpu")


class Recorder:
    """Captures as a GPU does: a capture runs nothing, a replay writes into the same outputs."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(
        self, step: Callable[[], Outputs], device: torch.device
    ) -> tuple[Outputs, Callable[[], None]]:
        assert device == CPU  # where the step's tensors are
        self.captures += 1
        outputs: list[Tensor] = [torch.empty(0), torch.empty(0)]

        def replay() -> None:
            self.replays += 1
            for old, new in zip(outputs, step(), strict=False):
                old.data = new.data

        return tuple(outputs), replay


def test_a_kind_is_captured_once_and_another_anew() -> None:
    seen: list[float] = []

    def double(x: Tensor) -> Outputs:
        seen.append(float(x.sum()))
        return (2 * x,)

    recorder = Recorder()
    replayed = Replayed(double, recorder)
    calls = 0
    for kind, size in (("a", 3), ("a", 4), ("b", 4), ("a", 3)):
        for step in range(WARMUPS + 2):
            calls += 1
            x = torch.full((size,), float(calls))
            assert torch.equal(replayed(kind, x)[0], 2 * x), (kind, size, step)
    assert recorder.captures == 4
    assert recorder.replays == 4 * 2
    assert len(seen) == calls  # a step is never run twice, nor left out


def test_a_capture_is_made_on_the_gpu_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several in a process, on a stream of its own."""
    seen: list[str] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        seen.append(f"on {device}")
        yield
        seen.append("off")

    @contextmanager
    def graph(made: object, *, stream: str, capture_error_mode: str) -> Iterator[None]:
        seen.append(f"captures on {stream}, {capture_error_mode}")
        yield
        seen.append("captured")

    def step() -> Outputs:
        seen.append("step")
        return ()

    made = SimpleNamespace(replay=lambda: seen.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    capture_graph(step, torch.device("cuda:1"))[1]()
    begin = ["on cuda:1", "captures on a stream of cuda:1, thread_local"]
    assert seen == [*begin, "step", "captured", "off", "replay"]


def search(
    task: ImageTask, recorder: Recorder | None, method: str, device: torch.device = CPU
) -> BilevelSearch:
    partial = 2 if method == "pcdarts" else 1
    config = SearchConfig(
        supernet=SupernetConfig(4, 3, partial, edge_normalisation=partial > 1),
        epochs=2,
        batch_size=16,
    )
    made = BilevelSearch(task, METHODS[method], config, seed=0, device=device, backend="eager")
    if recorder is not None:
        made.capture_steps(recorder)
    return made


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_a_search_that_replays_ends_with_the_same_bits(few_digits: ImageTask, method: str) -> None:
    recorder = Recorder()
    ours, theirs = search(few_digits, recorder, method), search(few_digits, None, method)
    expected, found = theirs.run(), ours.run()
    assert recorder.captures == 2  # either step, once for both epochs
    assert recorder.replays > 4
    assert found.genotype == expected.genotype
    for name, value in expected.supernet.state_dict().items():
        assert torch.equal(found.supernet.state_dict()[name], value), name
    assert found.records[-1].metrics["supernet/train_loss"] == pytest.approx(
        expected.records[-1].metrics["supernet/train_loss"], abs=0
    )


def test_what_python_decides_in_a_step_makes_it_another_kind(few_digits: ImageTask) -> None:
    made = search(few_digits, None, "darts")
    mixing = made.method.mixing(made.supernet)
    some = torch.ones(mixing.operations.shape, dtype=torch.bool)
    fewer = some.clone()
    fewer[0, 3, 5] = False
    kinds = [made._kind(replace(mixing, active=active)) for active in (None, some, fewer)]
    made.heads = (slice(0, 5), None)
    kinds.append(made._kind(mixing))
    assert len(set(kinds)) == len(kinds)
    assert made._kind(replace(mixing, active=fewer)) == made._kind(
        replace(mixing, active=fewer.clone())
    )


@pytest.mark.parametrize(
    ("wanted", "device", "backend", "method", "reason"),
    [
        ("auto", "cuda:1", "native", "darts", None),
        ("auto", "cuda", "native", "pcdarts", None),
        ("off", "cuda", "native", "darts", "as asked for"),
        ("auto", "cpu", "native", "darts", "the search runs on the cpu"),
        ("auto", "cuda", "eager", "darts", "the kernels are eager"),
        ("auto", "cuda", "native", "pdarts", "the steps of 'pdarts' cannot be captured"),
        ("auto", "cuda", "native", "darts-2nd", "the steps of 'darts-2nd' cannot be captured"),
    ],
)
def test_graphs_are_used_where_they_can_be_and_else_it_says_why(
    wanted: str, device: str, backend: str, method: str, reason: str | None
) -> None:
    graphs = choose_graphs(wanted, torch.device(device), backend, METHODS[method])
    assert graphs.used == (reason is None)
    assert reason is None or graphs.reason == reason


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].capturable])
def test_a_step_that_is_captured_neither_waits_nor_copies_from_the_cpu(
    few_digits: ImageTask, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda _: 2**40)
    monkeypatch.setattr(Mixing, "live", lambda mixing: mixing.active)  # as while it is captured
    made = search(few_digits, None, method, META)
    train, validation = next(made.batches())
    step = (train.images, train.labels, validation.images, validation.labels)
    for watched in (None, DeviceCopies()):  # the first steps make the optimisers' state
        with watched or nullcontext():
            made._move_architecture(*step)
            made._move_weights(*step[:2])
    assert watched is not None
    assert watched.copies == 0


def test_unknown_wish_is_refused(few_digits: ImageTask) -> None:
    with pytest.raises(
        UnknownNameError, match="unknown choice of CUDA graphs 'on': known are auto, off"
    ):
        BilevelSearch(
            few_digits, METHODS["darts"], SearchConfig(), seed=0, device=CPU, cuda_graphs="on"
        )


def test_a_search_on_the_cpu_captures_nothing(few_digits: ImageTask) -> None:
    made = BilevelSearch(
        few_digits, METHODS["darts"], SearchConfig(), seed=0, device=CPU, cuda_graphs="auto"
    )
    assert not made.graphs.used
    assert made.weights_replayed is None

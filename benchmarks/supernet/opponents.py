"""The implementations that are measured, behind one small interface."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.supernet.agreement import Evidence
from benchmarks.supernet.authors import Authors
from benchmarks.supernet.setting import (
    BACKWARD,
    FORWARD,
    SECOND_ORDER,
    SEED,
    STEP,
    Setting,
    UnavailableError,
)
from nas.errors import NASError
from nas.ops.backend import FLOAT32
from nas.search import BilevelSearch, find_method
from nas.spaces.darts.supernet import Supernet

# A second word is what images are stored in, where that is not float32.
IMPLEMENTATIONS = ("eager", "compile", "native", "native bfloat16", "authors")

Result = TypeVar("Result")


class Opponent(Protocol):
    """One implementation of the search step."""

    def forward(self) -> Tensor:
        """Loss of the training batch, as the weight step computes it."""

    def backward(self, loss: Tensor) -> None:
        """The gradient of that loss by the weights."""

    def step(self) -> None:
        """The whole first-order search step: architecture, then weights."""

    def second_order(self) -> None:
        """The second-order architecture step of DARTS."""

    def evidence(self) -> Evidence:
        """Outputs and gradients at today's weights."""


class Ours:
    """The project's own search with one supernet or another in it."""

    def __init__(self, search: BilevelSearch, supernet: Supernet) -> None:
        # The optimisers hold the search's parameters: the other supernet takes them over.
        for name in ("weights", "alphas", "betas"):
            setattr(supernet, name, getattr(search.supernet, name))
        search.supernet = supernet.to(search.device)
        self.search = search
        self.train, self.validation = next(search.batches())

    def forward(self) -> Tensor:
        search = self.search
        mixing = search.method.weight_mixing(search).detach()
        return search.loss(self.train, mixing, search.supernet.weights)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.grad(loss, [self.search.supernet.weights])

    def step(self) -> None:
        self.search.architecture_step(self.train, self.validation)
        self.search.weight_step(self.train)

    def second_order(self) -> None:
        first_order = self.search.method
        self.search.method = find_method("darts-2nd")
        self.search.architecture_step(self.train, self.validation)
        self.search.method = first_order

    def evidence(self) -> Evidence:
        search, method = self.search, self.search.method
        mixing = method.weight_mixing(search).detach()
        with torch.no_grad():
            scores = search.supernet(self.train.images, mixing, update_statistics=False)
        (weights,) = torch.autograd.grad(self.forward(), [search.supernet.weights])
        architecture = method.architecture_gradients(search, self.train, self.validation)
        return Evidence(scores, weights, torch.cat([part.flatten() for part in architecture]))


CPU = torch.device("cpu")


def make_opponent(
    name: str, setting: Setting, peers: Path | None = None, device: torch.device = CPU
) -> Opponent:
    """The implementation called ``name``, ready to step; all begin with the same weights.

    Raises:
        UnavailableError: it cannot take part on this machine or at this setting.
    """
    method, config = find_method(setting.method), setting.search_config()
    search = BilevelSearch(setting.task(), method, config, seed=SEED, device=device)
    if name == "compile":
        # Here, since the compiler takes 150 MB that no other implementation should be charged.
        from benchmarks.supernet.compiled import CompiledSupernet

        return Ours(search, CompiledSupernet(setting.shape, setting.supernet, seed=SEED))
    if name == "authors":
        ours = Ours(search, _supernet(setting, "eager"))
        return Authors(setting, peers, ours.search, ours.train, ours.validation)
    return Ours(search, _supernet(setting, name))


def stored_in(name: str) -> str:
    """What the implementation ``name`` stores images in."""
    return name.partition(" ")[2] or FLOAT32


def phases_of(name: str, setting: Setting) -> tuple[str, ...]:
    """The phases of ``setting`` that ``name`` does: second order is refused in bfloat16."""
    if stored_in(name) == FLOAT32:
        return setting.phases
    return tuple(phase for phase in setting.phases if phase != SECOND_ORDER)


def _supernet(setting: Setting, name: str) -> Supernet:
    """Raises UnavailableError where there is no such backend."""
    backend, storage = name.partition(" ")[0], stored_in(name)
    try:
        return Supernet(
            setting.shape, setting.supernet, seed=SEED, backend=backend, storage=storage
        )
    except NASError as error:
        raise UnavailableError(str(error)) from error


def take_turn(opponent: Opponent, phases: Sequence[str]) -> dict[str, float]:
    """Milliseconds of each phase, done once; the backward pass needs its forward one."""
    gc.collect()
    times = {}
    if FORWARD in phases:
        loss, times[FORWARD] = _timed(opponent.forward)
        _, times[BACKWARD] = _timed(lambda: opponent.backward(loss))
    if STEP in phases:
        _, times[STEP] = _timed(opponent.step)
    if SECOND_ORDER in phases:
        _, times[SECOND_ORDER] = _timed(opponent.second_order)
    return times


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, 1000 * (time.perf_counter() - start)

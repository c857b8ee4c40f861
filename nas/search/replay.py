"""Steps that are captured as a CUDA graph once and then replayed, without Python in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nas.errors import UnknownNameError
from nas.ops.backend import NATIVE

if TYPE_CHECKING:
    from nas.search.method import Method

AUTO, OFF = CUDA_GRAPHS = ("auto", "off")
WARMUPS = 3  # steps of a kind that run as they are: PyTorch makes its plans and buffers in them

Step = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Graphs:
    """Whether the steps of a search are captured as CUDA graphs; ``reason`` is for people."""

    used: bool
    reason: str


def choose_graphs(wanted: str, device: torch.device, backend: str, method: Method) -> Graphs:
    """What ``wanted`` ("auto" or "off") comes to with kernels of ``backend`` on ``device``.

    Raises:
        UnknownNameError: ``wanted`` is neither.
    """
    if wanted not in CUDA_GRAPHS:
        raise UnknownNameError("choice of CUDA graphs", wanted, CUDA_GRAPHS)
    if wanted == OFF:
        return Graphs(False, "as asked for")
    if device.type != "cuda":
        return Graphs(False, f"the search runs on the {device.type}")
    if backend != NATIVE:
        return Graphs(False, f"the kernels are {backend}")
    if not method.capturable:
        return Graphs(False, f"the steps of '{method.name}' cannot be captured")
    return Graphs(True, "both steps of the search are captured and replayed")


class Capture(Protocol):
    """Records ``step``, which works on the GPU ``device``, without running it; gives its outputs
    and what runs it into them."""

    def __call__(
        self, step: Callable[[], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]: ...


def capture_graph(
    step: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """``step`` as a CUDA graph, in memory of its own."""
    graph = torch.cuda.CUDAGraph()
    # The stream that PyTorch would take is one of the first GPU that captured anything. And what
    # other threads ask of CUDA meanwhile, as those that pin a loader's batches do, is no mistake.
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = step()
    return outputs, graph.replay


class Replayed:
    """A step, replayed from its capture while it stays of the same kind.

    Every call is one step: the first ones of a kind run as they are, the next is captured.

    Args:
        step: maps tensors on the GPU to tensors there; all else that it reads stays where it is,
            and every number that it reads from Python is part of the kind.
    """

    def __init__(self, step: Step, capture: Capture = capture_graph) -> None:
        self._step = step
        self._capture = capture
        self._kind: Hashable = None
        self._forget()

    def _forget(self) -> None:
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, kind: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step; what it gives is overwritten by the next.

        ``kind`` and the shapes of ``inputs`` together decide whether a capture still holds.
        """
        kind = (kind, tuple((x.shape, x.stride(), x.dtype) for x in inputs))
        if kind != self._kind:
            self._kind = kind
            self._forget()
        self._calls += 1
        if self._calls <= WARMUPS:
            return self._step(*inputs)
        if self._replay is None:
            self._inputs = tuple(x.clone() for x in inputs)
            own = self._inputs
            self._outputs, self._replay = self._capture(lambda: self._step(*own), inputs[0].device)
        for own_input, given in zip(self._inputs, inputs, strict=True):
            own_input.copy_(given)
        self._replay()
        return self._outputs

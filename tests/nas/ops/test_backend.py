"""Which twin of the mixed cell is taken, and what is said about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nas.data import TaskShape
from nas.errors import ConfigurationError, UnknownNameError
from nas.ops import build, mixed, native
from nas.ops.backend import Backend, choose
from nas.spaces.darts.supernet import Supernet, SupernetConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without kernels."""
    monkeypatch.setattr(build, "load", lambda say=print: build.Extension(None, "no compiler"))


def test_eager_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda say=print: pytest.fail("nothing is to be loaded"))
    backend = choose("eager")
    assert backend == Backend("eager", "as asked for")
    assert backend.mixed_cells(CPU) is mixed.mixed_cells


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("wanted", ["auto", "native"])
def test_native_where_it_can_be_had(wanted: str) -> None:
    backend = choose(wanted)
    assert backend.name == "native"
    module = build.load().module
    assert module is not None
    assert backend.reason.startswith(module.build_info()["instruction_set"])
    assert backend.mixed_cells(CPU) is native.mixed_cells


@pytest.mark.usefixtures("missing")
def test_without_kernels_auto_is_eager_and_says_why() -> None:
    assert choose() == Backend("eager", "no compiler")


@pytest.mark.usefixtures("missing")
def test_without_kernels_native_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no native kernels: no compiler; backend 'eager'"):
        choose("native")


def with_cuda(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    """A build with or without CUDA."""
    module = SimpleNamespace(build_info=lambda: {"instruction_set": "any", "cuda": built})
    monkeypatch.setattr(build, "load", lambda say=print: build.Extension(module, "no GPU here"))  # type: ignore[arg-type]
    monkeypatch.setattr(native, "register", lambda: None)


def test_devices_without_kernels_are_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, False)
    backend = choose("auto", CUDA)
    assert backend.name == "eager"
    assert backend.reason == "there are no native kernels for cuda in this build (no GPU here)"
    with pytest.raises(ConfigurationError, match="no native kernels for cuda in this build"):
        choose("native", CUDA)
    assert choose("native", CPU).mixed_cells(CUDA) is mixed.mixed_cells


def test_a_gpu_is_native_where_its_kernels_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, True)
    for device in (CPU, CUDA):
        backend = choose("auto", device)
        assert backend.name == "native"
        assert backend.mixed_cells(CPU) is backend.mixed_cells(CUDA) is native.mixed_cells


def test_unknown_backend_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'nativ'.*native"):
        choose("nativ")


def test_the_compilation_is_announced_to_whom_it_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def slow(say: object) -> build.Extension:
        assert callable(say)
        say("compiling")
        return build.Extension(None, "no compiler")

    monkeypatch.setattr(build, "load", slow)
    choose("auto", say=said.append)
    assert said == ["compiling"]


def test_a_supernet_takes_the_backend_that_it_is_told(backend: str) -> None:
    config = SupernetConfig(channels=2, cells=3)
    supernet = Supernet(TaskShape(1, 4, 4, 2), config, seed=0, backend=backend)
    assert supernet.backend.name == backend

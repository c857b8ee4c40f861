"""The CUDA kernels of csrc/cuda, run on the host by tests/cuda_emulation, as a twin of the cells.

They are compiled into build/, again where a source has changed. ``python tests/emulated_cells.py``
runs them under the address and the thread sanitizer (make sanitize).
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.ops import native, recipe
from nas.ops.mixed import CellPlan, Statistics
from nas.ops.toolchain import Cuda, find_compiler

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "cuda_emulation"
KINDS = ("double", "float", "tf32", "bfloat16", "half")
LIBRARY = "emulated.so"
FLAGS = (
    *("-std=c++20", "-fPIC", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-DNAS_EMULATION", f"-I{SOURCES}", f"-I{EMULATION}"),
)


def build(folder: Path, extra: tuple[str, ...] = (), program: Path | None = None) -> Path:
    """The library for torch in ``folder``, or with ``program`` an executable without torch, which
    has the kernels of single precision, with tensor cores and without, and of bfloat16 alone.

    Only what has changed since the last build is compiled, by one process at a time.

    Raises:
        NativeError: no compiler.
        RuntimeError: the sources do not compile.
    """
    compiler, none = find_compiler(), Cuda(None, "emulated")
    kinds = KINDS if program is None else ("float", "tf32", "bfloat16")
    flags = (*FLAGS, *extra)
    sources = {SOURCES / f"cell_{kind}.cu": flags for kind in kinds}
    if program is None:
        out, link = LIBRARY, ("-shared", *recipe._link_flags(none), *extra)
        sources[EMULATION / "operators.cpp"] = (*flags, *recipe._host_flags(compiler, none))
    else:
        out, link = program.stem, extra
        sources[program] = flags
    edges = [
        recipe.compile_edge(f"{source.name}.o", source, (*compiler.command, *own, "-x", "c++"))
        for source, own in sources.items()
    ]
    edges.append(recipe.link_edge(out, edges, compiler, (), link))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "build.log"
        with said.open("w") as log:
            status = recipe.make(edges, folder, log)
        if status:
            raise RuntimeError(f"the emulated kernels do not compile:\n{said.read_text()[-4000:]}")
    return folder / out


def run_sanitized(sanitizer: str) -> str:
    """What ``sanitized.cpp`` says under ``-fsanitize=sanitizer``, which ends it at a mistake."""
    extra = (f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer")
    folder = ROOT / "build" / f"emulation-{sanitizer.partition(',')[0]}"
    program = build(folder, extra, EMULATION / "sanitized.cpp")
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(program)], env={**os.environ, **options}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def load() -> None:
    """Compile what has changed and register ``torch.ops.nas_transfer_emulated``."""
    if not hasattr(torch.ops.nas_transfer_emulated, "mixed_cells"):
        torch.ops.load_library(str(build(ROOT / "build" / "emulation")))


@contextmanager
def filled_by(blocks: int) -> Iterator[None]:
    """As if so many blocks filled a GPU: fewer share more of a small cell's work each."""
    before = torch.ops.nas_transfer_emulated.set_blocks(blocks)
    try:
        yield
    finally:
        torch.ops.nas_transfer_emulated.set_blocks(before)


@contextmanager
def few_up_to(channels: int) -> Iterator[None]:
    """As if cells had few mixed channels, and kept less for backward, up to so many."""
    before = torch.ops.nas_transfer_emulated.set_few(channels)
    try:
        yield
    finally:
        torch.ops.nas_transfer_emulated.set_few(before)


@contextmanager
def on_tensor_cores(allowed: bool = True) -> Iterator[None]:
    """Sets PyTorch's own switch, which products of matrices in single precision obey."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills fresh memory with NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Stem(torch.autograd.Function):
    """The stem's operator, likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with poisoned():
            outputs: tuple[Tensor, ...] = torch.ops.nas_transfer_emulated.stem(*inputs)
        native._stem_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        operator = torch.ops.nas_transfer_emulated.stem_backward
        with poisoned():
            return native._stem_backward(ctx, *gradients, operator=operator)


class _Cells(torch.autograd.Function):
    """The operator, with the gradients that nas/ops/native.py registers for the native one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with poisoned():
            outputs: tuple[Tensor, ...] = torch.ops.nas_transfer_emulated.mixed_cells(*inputs)
        native._setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        operator = torch.ops.nas_transfer_emulated.mixed_cells_backward
        with poisoned():
            return native._backward(ctx, *gradients, operator=operator)


def stem(images: Tensor, weights: Tensor, statistics: Statistics, stored: torch.dtype) -> Tensor:
    """Twin of :func:`nas.ops.stem.stem`."""
    return native.call_stem(_Stem.apply, images, weights, statistics, stored)


def mixed_cells(
    plans: Sequence[CellPlan],
    before_previous: Tensor,
    previous: Tensor,
    weights: Tensor,
    statistics: Statistics,
    operations: Tensor,
    edges: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`nas.ops.mixed.mixed_cells`."""
    return native.call_operator(
        _Cells.apply,
        *(plans, before_previous, previous, weights, statistics, operations, edges, active),
    )


if __name__ == "__main__":
    for name in ("address,undefined", "thread"):
        print(f"{name}: {run_sanitized(name).strip()}", flush=True)

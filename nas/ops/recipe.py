"""How ``csrc/`` becomes ``nas._native``: what is needed, with which flags, and the build itself.

``setup.py`` and the just-in-time build of :mod:`nas.ops.build` both come here, so an extension is
the same however it was made. PyTorch is imported only to compile: ``setup.py`` reads this module
where there is none.

Every file has its own flags, for the kernels are compiled once per instruction set and one binary
runs on all of them. ``torch.utils.cpp_extension`` compiles all files alike, so it gives the paths
and ninja does the rest, or what stands in for it where it is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nas.errors import NativeError
from nas.ops.toolchain import (
    Compiler,
    Cuda,
    cuda_architectures,
    find_compiler,
    find_cuda,
    find_ninja,
    python_headers,
    switched_on,
)

MODULE = "_native"
FILE = MODULE + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
STAMP = f"{MODULE}.json"
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")

# torch's headers need C++20 since 2.15; nothing here may change what a NaN or an infinity does.
CXX_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
)
RELEASE = ("-O3", "-DNDEBUG")
DEBUG = ("-O0", "-g")
SANITIZE = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
# By the end of a file's name, plainest first. csrc/cpu/instruction_set.cpp asks for the same.
TARGET_FLAGS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"),
        *("-mavx2", "-mfma"),
    ),
}
NVCC_FLAGS = (
    "-std=c++20",
    "--expt-relaxed-constexpr",  # csrc/cell.h is the same for both
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)


@dataclass(frozen=True)
class Unit:
    """One source file, the rule that compiles it and its flags."""

    source: Path
    rule: str  # "cxx" or "nvcc"
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """One file to make, by a command that also writes what it read to ``out`` + ".d"; the file
    that all others are linked into is made by one that does not."""

    out: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A build that lacks nothing."""

    edges: tuple[Edge, ...]  # the last links the others
    digest: str  # of the sources
    summary: str  # what is built, in one line


def source_folder() -> Path:
    """Where the C++ sources lie: in an installed package, or beside it in a checkout.

    Raises:
        NativeError: they are in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise NativeError("the C++ sources were not installed with the package")


def source_files(sources: Path) -> list[Path]:
    """Every C++ and CUDA file below ``sources``, headers too, sorted."""
    return sorted(path for path in sources.rglob("*") if path.suffix in SUFFIXES)


def source_digest(sources: Path) -> str:
    """64 hex digits over the sources and the flags they are compiled with."""
    state = hashlib.sha256()
    for path in (Path(__file__), *source_files(sources)):
        name = path.name if path == Path(__file__) else path.relative_to(sources).as_posix()
        state.update(f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()};".encode())
    return state.hexdigest()


def _optimisation() -> tuple[str, ...]:
    if switched_on("NAS_TRANSFER_SANITIZE"):
        return SANITIZE
    return DEBUG if switched_on("DEBUG") else RELEASE


def units(sources: Path, compiler: Compiler, cuda: Cuda) -> list[Unit]:
    """Every file to compile, in the order in which the objects are linked.

    The order is part of the design. Where several objects hold the same inline function of a
    library, the linker keeps the first; with the plainest objects first that copy runs on every
    processor.
    """
    common = (*CXX_FLAGS, *_optimisation(), f"-I{sources}")
    host = (*common, *_host_flags(compiler, cuda))
    kernels: dict[str, list[Unit]] = {name: [] for name in TARGET_FLAGS}
    plain: list[Unit] = []
    for source in source_files(sources):
        target = source.stem.rpartition("_")[2]
        if source.suffix != ".cpp" or (source.parent.name == "cuda" and not cuda.home):
            continue
        if target not in kernels:
            plain.append(Unit(source, "cxx", host))
        elif compiler.x86 or target == "portable":
            kernels[target].append(Unit(source, "cxx", (*common, *TARGET_FLAGS[target])))
    device = []
    if cuda.home:
        debug = ("-O0", "-g") if switched_on("DEBUG") else ("-O3", "-lineinfo")
        flags = (*NVCC_FLAGS, *debug, f"-I{sources}", *cuda_architectures())
        device = [Unit(s, "nvcc", flags) for s in source_files(sources) if s.suffix == ".cu"]
    return [*plain, *(unit for target in kernels for unit in kernels[target]), *device]


def _host_flags(compiler: Compiler, cuda: Cuda) -> tuple[str, ...]:
    """For the files that see PyTorch and Python; the kernels' files see neither."""
    import torch

    flags = [
        f'-DNAS_TRANSFER_COMPILER="{compiler.name}"',
        f'-DNAS_TRANSFER_TORCH="{torch.__version__}"',
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    for folder in (*_torch_folders()[0], python_headers()):
        flags += ["-isystem", str(folder)]
    if _openmp(compiler):
        flags.append("-fopenmp")
    if cuda.home:
        flags += ["-DNAS_TRANSFER_CUDA", "-isystem", str(cuda.home / "include")]
    return tuple(flags)


def _torch_folders() -> tuple[list[str], list[str]]:
    """The folders of torch's headers and of its libraries."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns where there is nvcc but no GPU, which is no mistake
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    finally:
        log.setLevel(level)
    return include_paths(), library_paths()


def _openmp(compiler: Compiler) -> bool:
    """Whether at::parallel_for, a template, is compiled with threads.

    Only with g++, whose OpenMP calls torch's own libgomp answers. clang would bring a second
    runtime, in whose threads torch's omp_get_thread_num() is always 0.
    """
    import torch

    return not compiler.clang and sys.platform == "linux" and torch.backends.openmp.is_available()


def _link_flags(cuda: Cuda) -> tuple[str, ...]:
    # No -fopenmp: torch has loaded its OpenMP before, and a second one would have its own threads.
    flags = [f"-L{folder}" for folder in _torch_folders()[1]]
    flags += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if cuda.home:
        flags += [f"-L{cuda.home / name}" for name in ("lib64", "lib")]
        flags += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    if switched_on("NAS_TRANSFER_SANITIZE"):
        flags.append("-fsanitize=address,undefined")
    return tuple(flags)


def edges_of(sources: Path, compiler: Compiler, cuda: Cuda) -> list[Edge]:
    """What makes ``FILE`` in the folder that it is run in."""
    program = next(word for word in reversed(compiler.command) if not word.startswith("-"))
    nvcc = (str(cuda.home / "bin" / "nvcc"), "-ccbin", program) if cuda.home else ()
    edges = []
    for unit in units(sources, compiler, cuda):
        command = nvcc if unit.rule == "nvcc" else compiler.command
        out = f"{unit.source.relative_to(sources).as_posix()}.o"
        edges.append(compile_edge(out, unit.source, (*command, *unit.flags)))
    return [*edges, link_edge(FILE, edges, compiler, ("-shared",), _link_flags(cuda))]


def compile_edge(out: str, source: Path, command: Sequence[str]) -> Edge:
    """``command`` on one source."""
    name = str(source)
    return Edge(out, (name,), (*command, "-MMD", "-MF", f"{out}.d", "-c", name, "-o", out))


def link_edge(
    out: str, edges: Sequence[Edge], compiler: Compiler, first: Sequence[str], last: Sequence[str]
) -> Edge:
    """The objects of ``edges`` as one file; flags before and after them."""
    objects = tuple(edge.out for edge in edges)
    return Edge(out, objects, (*compiler.command, *first, *objects, *last, "-o", out))


def make(edges: Sequence[Edge], folder: Path, log: IO[str], keep_open: Sequence[int] = ()) -> int:
    """Make in ``folder`` what is not there or older than what it was made from.

    Where there is no ninja, everything, side by side like ninja. MAX_JOBS limits both.

    Args:
        edges: the last needs the others, which need none.
        log: a file for what the commands say.
        keep_open: file descriptors that they inherit.

    Returns:
        0, or the exit status of what went wrong.
    """

    def run(command: Sequence[str]) -> int:
        return subprocess.run(
            command,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(keep_open),
            check=False,
        ).returncode

    folder.mkdir(parents=True, exist_ok=True)
    limit, ninja = os.environ.get("MAX_JOBS"), find_ninja()
    if ninja is not None:
        (folder / "build.ninja").write_text(ninja_text(edges))
        return run([ninja, *(["-j", limit] if limit else [])])
    *compiled, linked = edges
    for edge in compiled:
        (folder / edge.out).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(limit or os.cpu_count() or 1)) as pool:
        failed = [status for status in pool.map(run, (e.command for e in compiled)) if status]
    return failed[0] if failed else run(linked.command)


def ninja_text(edges: Sequence[Edge]) -> str:
    """``edges`` as a build.ninja."""
    lines = ["ninja_required_version = 1.8"]
    lines += ["rule compile", "  command = $words", "  deps = gcc", "  depfile = $out.d"]
    lines += ["rule link", "  command = $words"]
    for edge in edges:
        rule = "link" if edge is edges[-1] else "compile"
        names = " ".join(_escape(n).replace(" ", "$ ").replace(":", "$:") for n in edge.inputs)
        lines.append(f"build {edge.out}: {rule} {names}")
        lines.append(f"  words = {_escape(shlex.join(edge.command))}")
    return "\n".join([*lines, f"default {edges[-1].out}", ""])


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def plan_build() -> Plan:
    """Find everything that a build needs.

    Raises:
        NativeError: something is missing; the message says what, and how to get it.
    """
    sources = source_folder().absolute()
    compiler = find_compiler()
    import torch

    cuda = find_cuda(sources)
    vectors = "AVX-512, AVX2 or portable by processor" if compiler.x86 else "portable"
    threads = "OpenMP" if _openmp(compiler) else "one thread"
    device = f"no CUDA ({cuda.why})"
    if cuda.home:
        codes = [flag.rpartition("=")[2] for flag in cuda_architectures()]
        device = f"CUDA for {' '.join(codes)} ({cuda.why})"
    summary = f"{compiler.name}, torch {torch.__version__}, {vectors}, {threads}, {device}"
    edges = tuple(edges_of(sources, compiler, cuda))
    return Plan(edges, source_digest(sources), summary)


def compile_extension(plan: Plan, folder: Path, keep_open: Sequence[int] = ()) -> None:
    """Make ``folder / FILE``; what an earlier build left there is used.

    Args:
        keep_open: file descriptors that the compilers inherit.

    Raises:
        NativeError: the compiler refuses the code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with log.open("w") as out:
        status = make(plan.edges, folder, out, keep_open)
    if status:
        lines = log.read_text(errors="replace").splitlines()
        error = next((line for line in lines if "error:" in line), (lines or ["?"])[-1])
        raise NativeError(
            f"the compiler stopped: {error.strip()} (all of it in {log}); "
            "NAS_TRANSFER_NO_EXTENSION=1 stops trying"
        )


def write_stamp(folder: Path, plan: Plan) -> None:
    """Say beside the finished extension what it was made from; without a stamp none is loaded."""
    import torch

    stamp = {"summary": plan.summary, "sources": plan.digest, "torch": torch.__version__}
    temporary = folder / f".{STAMP}.{os.getpid()}"
    temporary.write_text(json.dumps(stamp, indent=2))
    os.replace(temporary, folder / STAMP)

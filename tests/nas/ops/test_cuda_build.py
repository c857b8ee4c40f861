"""nvcc compiles the CUDA kernels, without a GPU, and the hot ones need no more than registers."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cuda_registers import (
    HOT,
    Kernel,
    check_host,
    compile_kernels,
    main,
    parse,
    report,
)
from nas.errors import NativeError
from nas.ops import toolchain

REPORT = """
ptxas info    : Compiling entry function 'void nas::cuda::dots<float, 4>(nas::cuda::Dots<float>)' for 'sm_90'
ptxas info    : Function properties for void nas::cuda::dots<float, 4>(nas::cuda::Dots<float>)
    40 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 40 bytes cumulative stack size, 16 bytes smem
"""  # noqa: E501


def test_the_report_is_read() -> None:
    kernel = Kernel("dots<float, 4>", 90, registers=128, shared=16, stack=40, spills=8)
    assert parse(REPORT) == [kernel]
    older = replace(kernel, architecture=80, registers=96)
    assert report([kernel, older, kernel], "nvcc 1").splitlines()[-1] == (
        "| **`dots<float, 4>`** | 96, 128 | 16 | 40 | 8 |"
    )


def test_the_log_of_a_build_is_read_and_spills_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt here")
    log, table = tmp_path / "build.log", tmp_path / "results" / "registers.md"
    arguments = ["--log", str(log), "--report", str(table)]
    log.write_text(REPORT)
    assert main(arguments) == 1
    assert capsys.readouterr().err == "dots<float, 4> spills\n"
    log.write_text(REPORT.replace("<float", "<double"))  # for comparisons, so it may
    assert main(arguments) == 0
    assert "| `dots<double, 4>` | 128 | 16 | 40 | 8 |" in table.read_text()
    log.write_text("ninja: no work to do.\n")
    assert main(arguments) == 1


# nvcc accepts both; in the first, the host's own code ends the process where it calls `get`.
HOST = """
template <typename T> struct Number { T x; %s T get() const { return x; } };
template <typename T> struct Call { T run() const { return Number<T>{1}.get(); } };
int answer() { return Call<int>().run(); }
"""


@pytest.mark.parametrize(("where", "fine"), [("__device__", False), ("__host__ __device__", True)])
def test_host_code_that_calls_the_device_is_found(tmp_path: Path, where: str, fine: bool) -> None:
    home = toolchain.find_cuda_home()
    if home is None:
        pytest.skip("no nvcc here")
    source = tmp_path / "host.cu"
    source.write_text(HOST % f"{where} __forceinline__")
    command = [str(home / "bin" / "nvcc"), "-c", str(source), "-o", str(tmp_path / "host.o")]
    subprocess.run(command, check=True)
    with nullcontext() if fine else pytest.raises(NativeError, match="calls a function of the dev"):
        check_host(tmp_path / "host.o")


# Every kind, and both architectures: all of either take a core a quarter of an hour, `make
# cuda-check`.
@pytest.mark.parametrize(
    ("kind", "architectures"),
    [
        ("float", (80, 90)),
        ("tf32", (90,)),
        ("bfloat16", (80,)),
        ("half", (90,)),
        ("double", (80,)),
    ],
)
def test_hot_kernels_do_not_spill(kind: str, architectures: tuple[int, ...]) -> None:
    if toolchain.find_cuda_home() is None:
        pytest.skip("no nvcc here")
    kernels = compile_kernels(kind, architectures)
    assert {kernel.name.partition("<")[0] for kernel in kernels} >= set(HOT)
    assert {kernel.architecture for kernel in kernels} == set(architectures)
    assert not [kernel for kernel in kernels if kernel.hot and kernel.spills]

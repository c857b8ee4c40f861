"""nvcc compiles the CUDA kernels, without a GPU, and the hot ones need no more than registers."""

from __future__ import annotations

import pytest

from benchmarks.cuda_registers import HOT, Kernel, compile_kernels, parse, report
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
    assert report([kernel], "nvcc 1").splitlines()[-1] == (
        "| **`dots<float, 4>`** | 90 | 128 | 16 | 40 | 8 |"
    )


@pytest.mark.parametrize("kind", ["float"])
def test_hot_kernels_do_not_spill(kind: str) -> None:
    if toolchain.find_cuda_home() is None:
        pytest.skip("no nvcc here")
    kernels = [kernel for kernel in compile_kernels(kind, [80, 90]) if kernel.hot]
    assert {kernel.name.partition("<")[0] for kernel in kernels} == set(HOT)
    assert {kernel.architecture for kernel in kernels} == {80, 90}
    assert not [kernel for kernel in kernels if kernel.spills]

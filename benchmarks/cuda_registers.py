"""What nvcc makes of the CUDA kernels: registers, stack and spills of each, by architecture.

    python -m benchmarks.cuda_registers [--architectures 80 90] [--kinds float tf32] [--report FILE]
    python -m benchmarks.cuda_registers --log build/cuda/native/build.log --report FILE

Facts of the compiler, and no timing. Needs nvcc and no GPU. Compiles some kinds of numbers and
links nothing, or reads what nvcc said when the extension was built with
NVCC_APPEND_FLAGS="-Xptxas -v". ``make cuda-check`` does so and writes the report that is under
benchmarks/results. It fails where a hot kernel spills, or where host code calls what only a GPU
can run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.errors import NativeError
from nas.ops import recipe, toolchain

# Where the time of a search step is expected to go: these must not spill.
HOT = ("convolve", "pointwise_gradient", "depthwise_gradient", "dots", "combine")
COLD = "<double"  # for comparisons alone: each number takes two registers
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    Attributes:
        name: with its template's arguments, demangled: ``convolve<float, 4>``.
        shared: bytes of shared memory beside what a launch asks for, which is up to 99 KiB.
        spills: bytes that its threads store for want of registers.
    """

    name: str
    architecture: int
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def hot(self) -> bool:
        """Whether a search step spends much of its time here."""
        return self.name.partition("<")[0] in HOT and COLD not in self.name


def compile_kernels(kind: str, architectures: Sequence[int]) -> list[Kernel]:
    """Every kernel for numbers of ``kind`` ("double", "float", "tf32", "bfloat16", "half").

    Raises:
        NativeError: there is no nvcc, or it refuses the sources.
    """
    home = toolchain.find_cuda_home()
    if home is None:
        raise NativeError("no CUDA toolkit in CUDA_HOME, beside nvcc or in /usr/local")
    source = recipe.source_folder() / "cuda" / f"cell_{kind}.cu"
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in architectures]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                str(home / "bin" / "nvcc"),
                *recipe.NVCC_FLAGS,
                *("-O3", "-Xptxas", "-v", *targets, "-c", str(source)),
                *("-o", str(Path(folder) / "cell.o")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NativeError(f"nvcc refuses {source.name}: {done.stderr.strip()[-500:]}")
        check_host(Path(folder) / "cell.o")
    return parse(demangled(done.stdout + done.stderr))


def check_host(compiled: Path) -> None:
    """Look for calls from the host to functions of the device alone in what nvcc made of a file.

    In a template it lets them pass and compiles each to ``exit``, for which nothing else asks.

    Raises:
        NativeError: there are such calls.
    """
    symbols = _output_of(["nm", "--undefined-only", str(compiled)]).split()
    if "exit" in symbols:
        raise NativeError(
            f"{compiled.name}: host code calls a function of the device, and would end"
        )


def parse(report: str) -> list[Kernel]:
    """The kernels of ptxas's report, whose names may have spaces once they are demangled."""
    kernels: list[Kernel] = []
    name, architecture, stack, spills = "", 0, 0, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for 'sm_(\d+)", line):
            name, architecture = _short(found[1]), int(found[2])
        elif found := STACK.search(line):
            stack, spills = int(found[1]), int(found[2])
        elif (found := USED.search(line)) and name:
            memory = SHARED.search(line)
            shared = int(memory[1]) if memory else 0
            kernels.append(Kernel(name, architecture, int(found[1]), shared, stack, spills))
            name = ""
    return kernels


def _short(name: str) -> str:
    """``convolve<float, 4>`` of a whole demangled signature."""
    name = name.removeprefix("void ").replace("nas::cuda::", "")
    return name[: name.rindex(">(") + 1] if ">(" in name else name.partition("(")[0]


def demangled(text: str) -> str:
    return _output_of(["c++filt"], text)


def _output_of(command: Sequence[str], text: str = "") -> str:
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, check=True
        ).stdout
    except OSError as error:
        raise NativeError(f"{command[0]} is missing: it comes with binutils") from error


def report(kernels: Sequence[Kernel], version: str) -> str:
    """A table, the hot kernels first; they are in bold.

    Several kinds of numbers share a kernel that sees their sums alone; it is listed once.
    """
    architectures = " and ".join(f"sm_{n}" for n in sorted({k.architecture for k in kernels}))
    lines = [
        f"What {version} makes of csrc/cuda for {architectures} (one number where they agree):",
        "compiled, not run, and nothing is timed. A launch asks for up to 99 KiB of shared memory",
        "beside what is listed.",
        "",
        "| kernel | registers | shared, bytes | stack, bytes | spills, bytes |",
        "|---|---|---|---|---|",
    ]
    by_name: dict[str, list[Kernel]] = {}
    for kernel in sorted(set(kernels), key=lambda k: (not k.hot, k.name, k.architecture)):
        by_name.setdefault(kernel.name, []).append(kernel)
    for name, same in by_name.items():
        cells = [f"**`{name}`**" if same[0].hot else f"`{name}`"]
        for column in ("registers", "shared", "stack", "spills"):
            numbers = [str(getattr(kernel, column)) for kernel in same]
            cells.append(numbers[0] if len(set(numbers)) == 1 else ", ".join(numbers))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def nvcc_version() -> str:
    """As in "nvcc 13.0"; "nvcc" where it does not say."""
    home = toolchain.find_cuda_home()
    if home is None:
        return "nvcc"
    asked = [str(home / "bin" / "nvcc"), "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, which is 1 where a hot kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kinds", nargs="+", default=["float"])
    parser.add_argument("--log", type=Path, help="read this instead of compiling")
    parser.add_argument("--report", type=Path, help="write the table there instead")
    options = parser.parse_args(arguments)
    if options.log is not None:
        kernels = parse(demangled(options.log.read_text()))
        for compiled in sorted(options.log.parent.rglob("*.cu.o")):
            check_host(compiled)
    else:
        kernels = [
            k for kind in options.kinds for k in compile_kernels(kind, options.architectures)
        ]
    if not kernels:
        print("nvcc said nothing of any kernel", file=sys.stderr)
        return 1
    text = report(kernels, nvcc_version())
    if options.report is None:
        print(text, end="")
    else:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text)
    spilling = {kernel.name for kernel in kernels if kernel.hot and kernel.spills}
    for name in sorted(spilling):
        print(f"{name} spills", file=sys.stderr)
    return int(bool(spilling))


if __name__ == "__main__":
    sys.exit(main())

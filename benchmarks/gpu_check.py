"""Everything that wants a GPU, in one call of under nine minutes (make gpu-check).

    python -m benchmarks.gpu_check [--skip-tests] [--json FILE]

Builds the kernels for the GPU at hand, runs their tests, runs one small step under
compute-sanitizer where that tool is, and times an epoch of a search and the search step. Needs
torch, pytest, hypothesis, numpy and nvcc. Results go to benchmarks/results/, named by device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import ImageTask, Splits, TaskShape, TensorImages
from nas.errors import NASError
from nas.search import METHODS, BilevelSearch, Method, SearchConfig
from nas.search.replay import capture_graph
from nas.spaces.darts.supernet import Supernet, SupernetConfig

RESULTS = Path(__file__).parent / "results"
SECONDS = 520  # of nine minutes; what does not fit any more is left out, and said
SAMPLES = 15
NONE = (
    "no GPU here: gpu-check builds, tests and times the kernels on one, so there is nothing to do"
)
TESTS = ("tests/nas/ops/test_cuda_device.py",)


@dataclass(frozen=True)
class Case:
    """One search step to time."""

    method: str
    batch: int
    numbers: str  # float32, tf32 (in products of matrices alone) or bfloat16 (by autocast)
    implementation: str  # eager, channels-last, eager-graphs, compiled, native, native-graphs

    @property
    def backend(self) -> str:
        """The supernet's."""
        return "native" if self.implementation.startswith("native") else "eager"


NUMBERS = ("float32", "tf32", "bfloat16")
IMPLEMENTATIONS = ("native", "native-graphs", "eager", "channels-last", "eager-graphs", "compiled")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--small", action="store_true", help="one small step and nothing else")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NONE)
        return 1
    if options.small:
        make_step(Case("darts", 2, "tf32", "native"), channels=4, cells=3, size=8)()
        torch.cuda.synchronize()
        return 0
    started = time.monotonic()
    if not options.skip_tests and run_tests():
        return 1
    rates = measure_rates()
    searches = [
        measure_search(method, batch, numbers, started)
        for numbers in ("float32", "tf32")
        for method, batch in (("pcdarts", 256), ("darts", 64))
    ]
    rows = []
    for implementation in IMPLEMENTATIONS:
        for numbers in NUMBERS:
            for batch in (64, 256):
                for method in ("darts", "pcdarts"):
                    case = Case(method, batch, numbers, implementation)
                    rows.append(vars(case) | measure(case, started))
                    print(rows[-1], flush=True)
    write(options.json, rates, rows, searches)
    return 0


def run_tests() -> int:
    """The tests on this GPU, then a small step under the sanitizers; not 0 is a failure."""
    failed = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS]).returncode
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here: memcheck and racecheck are left out")
        return failed
    for check in ("memcheck", "racecheck"):
        step = [sys.executable, "-m", "benchmarks.gpu_check", "--small"]
        failed |= subprocess.run([tool, "--tool", check, "--error-exitcode", "1", *step]).returncode
    return failed


def make_step(
    case: Case, channels: int = 16, cells: int = 8, size: int = 32
) -> Callable[[], tuple[Tensor, ...]]:
    """A first-order search step: gradients of the architecture, then of the weights, and SGD.

    ``case.numbers`` also sets PyTorch's switches for TF32, of products and of convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = case.numbers == "tf32"
    torch.backends.cudnn.allow_tf32 = case.numbers == "tf32"
    partial = 4 if case.method == "pcdarts" else 1
    config = SupernetConfig(channels, cells, partial, edge_normalisation=partial > 1)
    supernet = Supernet(TaskShape(3, size, size, 10), config, seed=0, backend=case.backend).cuda()
    method = METHODS[case.method]
    draw = torch.Generator("cuda").manual_seed(0)
    images = torch.randn(case.batch, 3, size, size, generator=draw, device="cuda")
    if case.implementation != "eager":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(case.batch, device="cuda") % 10
    forward: Callable[..., Tensor] = supernet
    if case.implementation == "compiled":
        forward = torch.compile(supernet, mode="reduce-overhead")

    def loss(mixing: Any, weights: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=case.numbers == "bfloat16"):
            return F.cross_entropy(forward(images, mixing, weights=weights).float(), labels)

    def step() -> tuple[Tensor, ...]:
        weights, parameters = supernet.weights, supernet.architecture_parameters()
        architecture = torch.autograd.grad(
            loss(method.mixing(supernet), weights.detach()), parameters
        )
        (gradient,) = torch.autograd.grad(
            loss(method.mixing(supernet).detach(), weights), [weights]
        )
        with torch.no_grad():
            weights -= 1e-6 * gradient / gradient.norm().clamp_min(1)
        return (gradient, *architecture)

    return step


def measure(case: Case, started: float) -> dict[str, Any]:
    """Median milliseconds of a step by CUDA events, and its peak memory; or why there are none."""
    if time.monotonic() - started > SECONDS:
        return {"left_out": "no time left"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make_step(case)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        run: Callable[[], Any] = step
        if case.implementation.endswith("graphs"):
            _, run = capture_graph(step)
        times = []
        for _ in range(SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    except (RuntimeError, torch.OutOfMemoryError) as error:  # one that fails leaves the others
        return {"left_out": str(error).partition("\n")[0]}
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
    }


def noise(images: int, size: int, channels: int) -> ImageTask:
    """Random pixels of ten classes: as much work as real images."""
    draw = torch.Generator().manual_seed(0)
    shape = (images, channels, size, size)
    pixels = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
    everything, nothing = torch.arange(images), torch.arange(0)
    return ImageTask(
        name="noise",
        description="random pixels",
        images=TensorImages(pixels),
        labels=everything % 10,
        classes=tuple("0123456789"),
        splits=Splits(everything, nothing, nothing),
        mean=(0.5,) * channels,
        std=(0.29,) * channels,
        flip=True,
        examples=pixels[:1],
        digest="noise",
    )


def epoch_seconds(
    task: ImageTask, method: Method, config: SearchConfig, device: torch.device
) -> float:
    """Of the second epoch of a search, loading, augmentation and both validations with it."""
    search = BilevelSearch(
        task,
        method,
        replace(config, epochs=2, warmup_epochs=0),
        seed=0,
        device=device,
        cuda_graphs="auto",
    )
    return search.run().records[-1].metrics["epoch_seconds"]


def measure_search(method: str, batch: int, numbers: str, started: float) -> dict[str, Any]:
    """Seconds of an epoch at CIFAR-10's size, and of as many as the paper's search has."""
    row: dict[str, Any] = {"method": method, "batch": batch, "numbers": numbers}
    if time.monotonic() - started > SECONDS:
        return row | {"left_out": "no time left"}
    torch.backends.cuda.matmul.allow_tf32 = numbers == "tf32"
    config = replace(METHODS[method].paper_config(), batch_size=batch)
    try:
        seconds = epoch_seconds(noise(50_000, 32, 3), METHODS[method], config, torch.device("cuda"))
    except (RuntimeError, NASError) as error:
        row["left_out"] = str(error).partition("\n")[0]
    else:
        row |= {"epoch_seconds": seconds, "search_seconds": seconds * config.epochs}
    print(row, flush=True)
    return row


def measure_rates() -> dict[str, float]:
    """What this GPU can: copied GB/s, read and written; TFLOP/s of matrix products."""
    numbers = torch.empty(2**28, device="cuda")
    copy = torch.empty_like(numbers)
    rates = {"copy_gb_s": 2 * 4 * numbers.numel() / _seconds(lambda: copy.copy_(numbers)) / 1e9}
    for name, dtype, narrow in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = narrow
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        rates[f"{name}_tflop_s"] = 2 * 8192**3 / _seconds(lambda a=a: a @ a) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def write(
    path: Path | None,
    rates: dict[str, float],
    rows: list[dict[str, Any]],
    searches: list[dict[str, Any]],
) -> None:
    """The results as JSON and as a table beside it."""
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = path or RESULTS / f"gpu-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    path.write_text(
        json.dumps({**about, "rates": rates, "steps": rows, "searches": searches}, indent=2) + "\n"
    )
    lines = [
        "| step | batch | numbers | implementation | ms | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        result = row.get("left_out") or f"{row['median_ms']:.2f} | {row['peak_mb']:.0f}"
        lines.append(
            f"| {row['method']} | {row['batch']} | {row['numbers']} | {row['implementation']} "
            f"| {result} |"
        )
    lines += ["", "| whole search | batch | numbers | seconds |", "|---|---|---|---|"]
    for row in searches:
        result = row.get("left_out") or f"{row['search_seconds']:.0f}"
        lines.append(f"| {row['method']} | {row['batch']} | {row['numbers']} | {result} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    sys.exit(main())

"""What gpu-check measures on a GPU, each part in a process of its own.

    python -m benchmarks.gpu_steps PART --rows FILE [--peers PATH]

A part adds its rows to FILE as it finds them, one JSON object a line, so that what was measured
before it fails, or is ended, is not lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.supernet.floors import work
from nas.data import ImageTask, Splits, TaskShape, TensorImages
from nas.errors import NASError
from nas.ops import build
from nas.search import METHODS, BilevelSearch, Method, SearchConfig
from nas.search.replay import capture_graph
from nas.spaces.darts.supernet import Supernet, SupernetConfig

GPU = torch.device("cuda", 0)
SAMPLES = 15
ENOUGH = 5, 2.0  # samples and seconds of one case, for what is slow
WARM_UP = 3
NUMBERS = ("float32", "tf32", "bfloat16")
BATCHES = (64, 256)
IMPLEMENTATIONS = (
    *("native", "native-graphs", "eager", "compiled-graphs"),
    *("authors", "channels-last", "eager-graphs", "compiled"),
)

Row = dict[str, Any]
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One search step to time."""

    method: str
    batch: int
    numbers: str  # float32, tf32 (in products of matrices alone) or bfloat16 (by autocast)
    implementation: str  # one of IMPLEMENTATIONS

    @property
    def backend(self) -> str:
        """The supernet's."""
        return "native" if self.implementation.startswith("native") else "eager"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["build", "small", "rates", "searches", *IMPLEMENTATIONS])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--peers", type=Path, help="the folder of the authors' checkouts")
    options = parser.parse_args(arguments)
    if options.part == "build":
        return build_kernels()
    if options.part == "small":
        for method, numbers in (("darts", "tf32"), ("pcdarts", "float32"), ("darts", "bfloat16")):
            make_step(Case(method, 2, numbers, "native"), channels=8, cells=3, size=8)()
        torch.cuda.synchronize()
        return 0
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "rates": measure_rates,
        "searches": measure_searches,
    }
    rows = parts.get(options.part, lambda: measure_steps(options.part, options.peers))()
    for row in rows:
        print(row, flush=True)
        if options.rows is not None:
            with options.rows.open("a") as file:  # on a line of its own, whatever came before
                file.write("\n" + json.dumps(row))
    return 0


def build_kernels() -> int:
    """Compile for this GPU, or say why not; not 0 where there are no kernels for it."""
    extension = build.load()
    print(extension.reason)
    return int(extension.module is None or not extension.module.build_info()["cuda"])


# ---- steps ----


def make_step(
    case: Case, channels: int = 16, cells: int = 8, size: int = 32, device: torch.device = GPU
) -> Step:
    """A first-order search step: gradients of the architecture, then of the weights, and SGD.

    ``case.numbers`` also sets PyTorch's switches for TF32, of products and of convolutions.
    """
    _set_numbers(case.numbers)
    shape, config = TaskShape(3, size, size, 10), _supernet(case.method, channels, cells)
    supernet = _kind(case)(shape, config, seed=0, backend=case.backend).to(device)
    method = METHODS[case.method]
    draw = torch.Generator(device).manual_seed(0)
    images = torch.randn(case.batch, 3, size, size, generator=draw, device=device)
    if case.implementation != "eager":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(case.batch, device=device) % 10

    def loss(mixing: Any, weights: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.numbers == "bfloat16"):
            return F.cross_entropy(supernet(images, mixing, weights=weights).float(), labels)

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


def authors_step(case: Case, peers: Path | None) -> Step:
    """Theirs, as their training script does it.

    Raises:
        NASError: their code is not given, or not for this.
    """
    from benchmarks.supernet.opponents import make_opponent
    from benchmarks.supernet.setting import Setting, UnavailableError

    if case.numbers == "bfloat16":
        raise UnavailableError("their code has no autocast")
    _set_numbers(case.numbers)
    setting = Setting(case.method, 32, case.batch, _supernet(case.method))
    opponent = make_opponent("authors", setting, peers, GPU)

    def step() -> tuple[Tensor, ...]:
        opponent.step()
        return ()

    return step


def _supernet(method: str, channels: int = 16, cells: int = 8) -> SupernetConfig:
    partial = 4 if method == "pcdarts" else 1
    return SupernetConfig(channels, cells, partial, edge_normalisation=partial > 1)


def _kind(case: Case) -> type[Supernet]:
    if not case.implementation.startswith("compiled"):
        return Supernet
    from benchmarks.supernet.compiled import CompiledSupernet  # by regions: see there

    return CompiledSupernet


def _set_numbers(numbers: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = numbers == "tf32"
    torch.backends.cudnn.allow_tf32 = numbers == "tf32"


def measure_steps(implementation: str, peers: Path | None) -> Iterator[Row]:
    """All steps of one implementation, those of single precision first."""
    for numbers in NUMBERS:
        for batch in BATCHES:
            for method in ("darts", "pcdarts"):
                case = Case(method, batch, numbers, implementation)
                yield {"kind": "step", **vars(case), **measure(case, peers)}


def measure(case: Case, peers: Path | None = None) -> Row:
    """Milliseconds of a step by CUDA events, what it does in them, and its peak memory; or why
    there are none."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make_step(case) if case.implementation != "authors" else authors_step(case, peers)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.synchronize()
        run: Callable[[], Any] = step
        if case.implementation.endswith("graphs"):
            _, run = capture_graph(step, GPU)
        times = [1e3 * seconds for seconds in _timed(run, SAMPLES)]
    except (RuntimeError, torch.OutOfMemoryError, NASError) as error:  # leaves the others
        return {"left_out": str(error).partition("\n")[0]}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {**speed(case, statistics.median(times)), "min_ms": min(times), "peak_mb": peak}


def speed(case: Case, milliseconds: float) -> Row:
    """The rates that a step of ``milliseconds`` comes to: its convolutions' arithmetic, and the
    traffic if every state crosses memory once a pass and direction."""
    supernet = Supernet(TaskShape(3, 32, 32, 10), _supernet(case.method), seed=0, backend="eager")
    gflop, gigabytes = work(supernet, case.batch, bytes_each=2 if case.numbers == "bfloat16" else 4)
    return {
        "median_ms": milliseconds,
        "gflop": gflop,
        "gigabytes": gigabytes,
        "tflop_s": gflop / milliseconds,
        "gb_s": 1e3 * gigabytes / milliseconds,
    }


def floor_ms(row: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    """The least that a GPU of ``rates`` needs for the step of ``row``."""
    arithmetic = row["gflop"] / rates[f"{row['numbers']}_tflop_s"]
    return max(arithmetic, 1e3 * row["gigabytes"] / rates["copy_gb_s"])


# ---- searches ----


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


def measure_searches() -> Iterator[Row]:
    """Seconds of an epoch at CIFAR-10's size, and of as many as the paper's search has."""
    task = noise(50_000, 32, 3)
    for numbers in ("float32", "tf32"):
        for method, batch in (("pcdarts", 256), ("darts", 64)):
            row: Row = {"kind": "search", "method": method, "batch": batch, "numbers": numbers}
            _set_numbers(numbers)
            config = replace(METHODS[method].paper_config(), batch_size=batch)
            try:
                seconds = epoch_seconds(task, METHODS[method], config, GPU)
            except (RuntimeError, NASError) as error:
                yield {**row, "left_out": str(error).partition("\n")[0]}
            else:
                whole = seconds * config.epochs
                yield {**row, "epoch_seconds": seconds, "search_seconds": whole}


# ---- the GPU itself ----


def measure_rates() -> Iterator[Row]:
    """What this GPU can: copied GB/s, read and written; TFLOP/s of matrix products."""
    numbers = torch.empty(2**28, device="cuda")
    copy = torch.empty_like(numbers)
    row: Row = {"kind": "rates", "copy_gb_s": 8e-9 * 2**28 / _median(lambda: copy.copy_(numbers))}
    for name in NUMBERS:
        _set_numbers(name)
        a = torch.randn(8192, 8192, device="cuda")
        a = a.bfloat16() if name == "bfloat16" else a
        row[f"{name}_tflop_s"] = 2e-12 * 8192**3 / _median(lambda a=a: a @ a)
    yield row


def _median(run: Callable[[], Any]) -> float:
    run()
    return statistics.median(_timed(run, 7))


def _timed(run: Callable[[], Any], samples: int) -> list[float]:
    """Seconds of each of ``samples`` runs, or of enough, by the GPU's own clock."""
    times: list[float] = []
    while len(times) < samples and (len(times) < ENOUGH[0] or sum(times) < ENOUGH[1]):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


if __name__ == "__main__":
    sys.exit(main())

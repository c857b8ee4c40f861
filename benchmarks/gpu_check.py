"""Everything that wants a GPU, in one call of under nine minutes (make gpu-check).

    python -m benchmarks.gpu_check [--peers PATH] [--parts NAME ...] [--json FILE]

Builds the kernels for the GPU at hand, runs their tests, measures what the GPU can and times the
search step and epochs of whole searches, and runs one small step under compute-sanitizer where that
tool is. Needs torch, pytest, hypothesis, numpy and nvcc; ``--peers`` names the folder of the
authors' checkouts. Results go to benchmarks/results/, named by device.

Each part is a process of its own with a time of its own, and what it has found is written as soon
as it ends, however it ends: a kernel that fails takes every later call of its process with it. For
what there was no time, ``--parts`` with another ``--json`` makes up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_steps import Row, floor_ms

RESULTS = Path(__file__).parent / "results"
SECONDS = 520.0  # of nine minutes; what does not fit any more is left out, and said
LEAST = 5.0  # seconds; a process that has only imported PyTorch says nothing
NONE = (
    "no GPU here: gpu-check builds, tests and times the kernels on one, so there is nothing to do"
)
TESTS = ("tests/nas/ops/test_cuda_device.py",)
DONE = "done"


@dataclass(frozen=True)
class Part:
    """What one process does, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needed: bool = False  # without it the others mean nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, which is 0 where all of build, tests and sanitizers
    went well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, help="the folder of the authors' checkouts")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these, e.g. build tests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not torch.cuda.is_available():
        print(NONE)
        return 1
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.json or RESULTS / f"gpu-{device}.json"
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        wanted = [
            part
            for part in parts(rows, options.peers)
            if options.parts is None or part.name in options.parts
        ]
        outcomes = run_parts(wanted, rows, path, started)
    checks = ("build", "tests", "memcheck", "racecheck")
    return int(any(o["outcome"] != DONE for o in outcomes if o["part"] in checks))


def parts(rows: Path, peers: Path | None) -> list[Part]:
    """Most telling first: the time may not be enough for all."""
    steps = (sys.executable, "-m", "benchmarks.gpu_steps")
    write = ("--rows", str(rows), *(("--peers", str(peers)) if peers else ()))
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here: memcheck and racecheck are left out")
    # Each tensor in memory of its own, beyond which nothing may be touched.
    alone = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", str(tool), "--error-exitcode", "1")
    checks = [
        Part(check, (*alone, "--tool", check, *steps, "small"), 45)
        for check in ("memcheck", "racecheck")
        if tool
    ]

    def measured(name: str, seconds: float) -> Part:
        return Part(name, (*steps, name, *write), seconds)

    return [
        Part("build", (*steps, "build"), 300, needed=True),
        Part("tests", (sys.executable, "-m", "pytest", "-q", *TESTS), 150),
        measured("rates", 40),
        measured("native", 45),
        measured("native-graphs", 60),
        measured("searches", 100),
        measured("eager", 50),
        measured("compiled-graphs", 120),
        *([measured("authors", 50)] if peers else []),
        *checks,
        *(measured(name, 40) for name in ("channels-last", "eager-graphs", "compiled")),
    ]


def run_parts(parts: Sequence[Part], rows: Path, path: Path, started: float) -> list[Row]:
    """Run them in turn until the time is up; write what is known after each."""
    outcomes: list[Row] = []
    for part in parts:
        begun = time.monotonic()
        outcome = run_part(part, SECONDS - (begun - started))
        seconds = round(time.monotonic() - begun, 1)
        outcomes.append({"part": part.name, "outcome": outcome, "seconds": seconds})
        print(f"{part.name}: {outcome}, {seconds} s", flush=True)
        found = rows.read_text().splitlines() if rows.exists() else []
        write(path, outcomes, [json.loads(line) for line in found if line.endswith("}")])
        if part.needed and outcome != DONE:
            break
    return outcomes


def run_part(part: Part, left: float) -> str:
    """DONE, or what went wrong. The process and all that it started end with its time."""
    if left < LEAST:
        return "no time left"
    limit = min(part.seconds, left)
    process = subprocess.Popen(part.command, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return DONE if status == 0 else f"failed with status {status}"


def write(path: Path, outcomes: Sequence[Row], rows: Sequence[Row]) -> None:
    """The results as JSON and as tables beside it."""
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.partition(" ")[0],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**about, "parts": list(outcomes), "rows": list(rows)}, indent=2)
    path.write_text(content + "\n")
    rates = next((row for row in rows if row["kind"] == "rates"), None)
    tables = [
        _table("part|outcome|seconds", [list(o.values()) for o in outcomes]),
        _table("this GPU at best", [[f"{name}: {value}"] for name, value in (rates or {}).items()]),
        _table(
            "step|batch|numbers|implementation|ms|peak MB|TFLOP/s|GB/s|times the floor",
            [_step(row, rates) for row in rows if row["kind"] == "step"],
        ),
        _table(
            "whole search|batch|numbers|seconds",
            [_search(row) for row in rows if row["kind"] == "search"],
        ),
    ]
    title = f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}"
    path.with_suffix(".md").write_text("\n".join([title, "", *tables]))


def _step(row: Row, rates: Row | None) -> list[Any]:
    columns = [row[name] for name in ("method", "batch", "numbers", "implementation")]
    if "left_out" in row:
        return [*columns, row["left_out"]]
    times = f"{row['median_ms'] / floor_ms(row, rates):.2f}" if rates else "?"
    numbers = ("median_ms", ".2f"), ("peak_mb", ".0f"), ("tflop_s", ".1f"), ("gb_s", ".0f")
    return [*columns, *(format(row[name], style) for name, style in numbers), times]


def _search(row: Row) -> list[Any]:
    columns = [row[name] for name in ("method", "batch", "numbers")]
    return [*columns, row["left_out"] if "left_out" in row else f"{row['search_seconds']:.0f}"]


def _table(columns: str, rows: Sequence[Sequence[Any]]) -> str:
    names = columns.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

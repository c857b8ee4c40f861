"""What the measurements were taken on, and what that machine can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

PROBE_SIDE = 256  # three matrices of 256 KiB: they stay in a core's own cache
PROBE_SECONDS = 0.05
CLEAN_RATIO = 1.8  # of two threads' throughput to one's; below it the second core is not there


def describe_machine() -> dict[str, Any]:
    """Processor, versions, load and commit, as JSON values."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": load_average(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def load_average() -> float:
    """Processes that wanted a core in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def second_core_is_there() -> bool:
    """Whether two threads do at least 1.8 times the work of one just now; takes 0.1 s.

    The host of a virtual machine may put two virtual cores on one real core for a while. Nothing
    in the guest shows it but the throughput.
    """
    return second_core_ratio() >= CLEAN_RATIO


def second_core_ratio() -> float:
    """Products a second of two threads over those of one, each in its own cache."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        alone = pool.submit(_products, Barrier(1)).result()
        together = Barrier(2)
        both = [pool.submit(_products, together) for _ in range(2)]
        ratio = sum(future.result() for future in both) / alone
    torch.set_num_threads(before)
    return ratio


def _products(start: Barrier) -> float:
    """Matrix products a second of this thread."""
    left, right, out = (torch.ones(PROBE_SIDE, PROBE_SIDE) for _ in range(3))
    torch.mm(left, right, out=out)
    start.wait()
    began = time.perf_counter()
    count = 0
    while (now := time.perf_counter()) < began + PROBE_SECONDS:
        torch.mm(left, right, out=out)
        count += 1
    return count / (now - began)


def matrix_gflops(threads: int, side: int = 1024, seconds: float = 0.5) -> float:
    """Best rate of a float32 matrix product, in 10^9 operations a second."""
    left, right, out = (torch.rand(side, side) for _ in range(3))
    best = _best_seconds(lambda: torch.mm(left, right, out=out), threads, seconds)
    return 2e-9 * side**3 / best


def copy_gigabytes(threads: int, megabytes: int = 256, seconds: float = 0.5) -> float:
    """Best rate of a copy that no cache holds, in 10^9 bytes read and written a second."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    best = _best_seconds(lambda: target.copy_(source), threads, seconds)
    return 2e-9 * source.nbytes / best


def _best_seconds(work: Any, threads: int, seconds: float) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(before)
    return best


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of this checkout; "+" says that it was altered since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()

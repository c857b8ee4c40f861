"""Peak memory of one implementation, in a process of its own: a process has only one peak.

    python -m benchmarks.supernet.memory '{"name": ..., "setting": ..., ...}'

is started by :func:`measure_memory`, and prints JSON. It runs before the implementation is timed,
so that one that does not fit into the machine, or does not work, is known by then.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # PyTorch's optimisers import it, 150 MB, whoever steps: no part of a step

from benchmarks.supernet.opponents import make_opponent, phases_of, take_turn
from benchmarks.supernet.setting import (
    BACKWARD,
    FORWARD,
    SECOND_ORDER,
    STEP,
    Setting,
    UnavailableError,
)
from nas.hardware import peak_memory_mb

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """What a process of its own showed.

    Attributes:
        idle_mb: resident after the imports, before anything was built.
        peak_mb: highest resident set of each phase, the idle part included, in 2^20 bytes.
        first_seconds: of the first turn, with all that is compiled in it.
    """

    idle_mb: float
    peak_mb: dict[str, float]
    first_seconds: float


def measure_memory(name: str, setting: Setting, threads: int, peers: Path | None) -> Memory:
    """Step the implementation ``name`` in a fresh process.

    Raises:
        UnavailableError: it was killed, or failed.
    """
    request = {
        "name": name,
        "setting": setting.to_json(),
        "threads": threads,
        "peers": None if peers is None else str(peers.resolve()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.supernet.memory", json.dumps(request)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise UnavailableError(
            f"its process was killed by signal {-done.returncode}, most likely for want of memory"
        )
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"it fails in a process of its own: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    request = json.loads(sys.argv[1])
    setting = Setting.from_json(request["setting"])
    torch.set_num_threads(request["threads"])
    idle = _peak_mb()
    peers = None if request["peers"] is None else Path(request["peers"])
    opponent = make_opponent(request["name"], setting, peers)
    start = time.perf_counter()
    phases = phases_of(request["name"], setting)
    take_turn(opponent, phases)  # what is compiled or planned once is no part of a phase
    first_seconds = time.perf_counter() - start
    peaks = {}
    for work in ((FORWARD, BACKWARD), (STEP,), (SECOND_ORDER,)):
        if set(work) <= set(phases):
            _forget_peak()
            for _ in range(2):
                take_turn(opponent, work)
            peaks.update(dict.fromkeys(work, _peak_mb()))
    print(json.dumps({"idle_mb": idle, "peak_mb": peaks, "first_seconds": first_seconds}))


def _forget_peak() -> None:
    """Start a new high-water mark where the system can; elsewhere it stays that of the process."""
    if RESET.exists():
        RESET.write_text("5")


def _peak_mb() -> float:
    # Not getrusage where there is something better: on Linux its mark begins with that of the
    # process this one was started from.
    if STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(match[1]) / 1024
    return peak_memory_mb(torch.device("cpu"))


if __name__ == "__main__":
    main()

"""How fast small networks train alone, on all cores, and side by side with a core each.

    python -m benchmarks.side_by_side [--rounds 7] [--json FILE]

The arrangements take turns in one process, so that a machine that slows down slows all of them.
Correctness comes first: the three arrangements must end with the same loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nas.architecture import Skeleton
from nas.data import Augmentation, Batches, ImageTask, load_task
from nas.randomness import generator
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED
from pipeline.team import Team

BATCH, STEPS = 64, 12


def train(task: ImageTask) -> float:
    """A few steps of the default job's training; returns the last loss."""
    space = DartsSpace()
    architecture = space.from_genotype(PUBLISHED["DARTS_V2"], Skeleton("cifar", 8, 4))
    network = space.network(architecture, task.shape, auxiliary=False, generator=generator(0))
    network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    batches = Batches(
        task,
        task.splits.train[: BATCH * STEPS],
        BATCH,
        seed=0,
        stream="benchmark",
        augmentation=Augmentation(crop_padding=1, cutout=3),
    )
    for batch in batches.epoch():
        loss = F.cross_entropy(network(batch.images), batch.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


def measure(side: int, rounds: int, cores: int) -> dict[str, list[float]]:
    """Images a second of each arrangement, one value a round."""
    task = load_task("animals", root=Path(), image_size=side)

    def alone(threads: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            torch.set_num_threads(threads)
            return [train(task)]

        return run

    def together() -> list[float]:
        torch.set_num_threads(cores)
        with Team(cores) as team:
            return team.map(train, [task] * cores)

    arrangements = {
        "alone, 1 thread": alone(1),
        f"alone, {cores} threads": alone(cores),
        f"{cores} side by side": together,
    }
    losses = [loss for run in arrangements.values() for loss in run()]  # warm-up and check
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the arrangements disagree: losses {losses}")
    speeds: dict[str, list[float]] = {name: [] for name in arrangements}
    for _ in range(rounds):
        for name, run in arrangements.items():
            start = time.perf_counter()
            networks = len(run())
            speeds[name].append(networks * BATCH * STEPS / (time.perf_counter() - start))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = torch.get_num_threads()
    rows = []
    for side in (14, 28):
        for name, speeds in measure(side, options.rounds, cores).items():
            row = {
                "side": side,
                "arrangement": name,
                "median": statistics.median(speeds),
                "min": min(speeds),
                "max": max(speeds),
            }
            rows.append(row)
            print(
                "{side}x{side}  {arrangement:18}  {median:6.0f} images/s  "
                "[{min:.0f}, {max:.0f}]".format(**row)
            )
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": cores,
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

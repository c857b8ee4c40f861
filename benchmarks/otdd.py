"""Time and memory of the distance between two sets of 10,000 images and 100 classes.

    python -m benchmarks.otdd [--json FILE]

The images are noise around a picture of their class, 32x32 colour: what a distance costs depends on
their number, classes and features, not on what they show. Each row is a process of its own, whose
peak memory is what it has above that after its imports and the making of the images. The budget is
30 seconds on 2 cores and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.supernet.machine import describe_machine
from nas.data import ImageTask, Splits, TensorImages
from nas.randomness import generator
from nas.transfer.otdd import OTDDConfig, describe, distance, pixels, principal_components

IMAGES, CLASSES, SIDE, THREADS = 10_000, 100, 32, 2
SECONDS, MEGABYTES = 30, 2000  # the budget
ROWS = [
    ("pca", OTDDConfig()),
    ("pixels", OTDDConfig()),
    ("pca", OTDDConfig("diagonal")),
    ("pca", OTDDConfig("exact")),
    ("pca", OTDDConfig("gaussian", "entropic")),
    ("pca", OTDDConfig("diagonal", "sliced")),
]


@dataclass(frozen=True)
class Row:
    """What one way to measure a distance costs, both sets described anew.

    ``describe_seconds`` is of both sets with the fitting of principal components; ``peak_mb`` in
    MiB above the images and imports.
    """

    features: str
    labels: str
    outer: str
    describe_seconds: float
    distance_seconds: float
    peak_mb: float
    distance: float

    @property
    def seconds(self) -> float:
        return self.describe_seconds + self.distance_seconds


def make_task(seed: int) -> ImageTask:
    """10,000 images of 100 classes, all for training."""
    draw = generator(seed, "otdd benchmark")
    labels = torch.arange(IMAGES) % CLASSES
    pictures = torch.randint(256, (CLASSES, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    noise = torch.randint(64, (IMAGES, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    images = TensorImages(pictures[labels] // 4 * 3 + noise)
    return ImageTask(
        name=f"noise {seed}",
        description="noise around a picture of each class",
        images=images,
        labels=labels,
        classes=tuple(map(str, range(CLASSES))),
        splits=Splits(torch.arange(IMAGES), none, none),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        flip=False,
        examples=images.gather(torch.arange(1)),
        digest=f"benchmark {seed}",
    )


def measure(features: str, config: OTDDConfig) -> Row:
    """One row; to be called in a process that has measured nothing before."""
    torch.set_num_threads(THREADS)
    tasks = [make_task(0), make_task(1)]
    before = _resident_mb("VmRSS")
    # Linux: the peak so far is forgotten
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    embedding = pixels() if features == "pixels" else principal_components(tasks)
    sketches = [describe(task, embedding, 0) for task in tasks]
    described = time.perf_counter()
    value = distance(*sketches, config)
    end = time.perf_counter()
    peak = _resident_mb("VmHWM") - before
    return Row(
        features, config.labels, config.outer, described - start, end - described, peak, value
    )


def _resident_mb(name: str) -> float:
    """A line of this process's status that is in kB, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    torch.set_num_threads(THREADS)
    machine = describe_machine()
    rows = []
    print("features  labels    outer     describe  distance      peak   within budget")
    for features, config in ROWS:
        with processes.Pool(1) as pool:
            row = pool.apply(measure, (features, config))
        rows.append(row)
        within = row.seconds < SECONDS and row.peak_mb < MEGABYTES
        print(
            f"{row.features:8}  {row.labels:8}  {row.outer:8}  {row.describe_seconds:6.1f} s  "
            f"{row.distance_seconds:6.1f} s  {row.peak_mb:4.0f} MiB  {'yes' if within else 'NO'}",
            flush=True,
        )
    if options.json:
        report = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

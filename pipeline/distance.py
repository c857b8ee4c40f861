"""How far data sets are from one another: describe each, then compare every pair."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nas.data import ImageTask
from nas.data.catalog import FOLDER_PREFIX
from nas.errors import ConfigurationError, UnknownNameError
from nas.search import find_method
from nas.transfer.otdd import (
    DatasetSketch,
    Embedding,
    OTDDConfig,
    cached_distance,
    describe,
    load_sketch,
    pixels,
    pretrained,
    principal_components,
    save_sketch,
    shapes,
    supernet_trunk,
)
from nas.transfer.otdd.networks import RESNETS
from nas.transfer.zoo import load_entry
from pipeline.console import counting, say
from pipeline.figures import draw_distances, draw_map, nearest
from pipeline.job import Job, Machine, open_job, ui_command, watched
from pipeline.registry import find_version
from pipeline.searches import PICTURES, past_search
from pipeline.settings import DataSettings
from pipeline.specification import RUN
from pipeline.steps import StepRun, home, run_step
from pipeline.zoo import DISTANCES, PREFIX, load_stored

SKETCH_FILE = "sketch.safetensors"
MATRIX_FILE = "distances.csv"
FEATURES = {
    "pca": "the first 64 principal components of the images of all these sets at 16x16",
    "shapes": "the images at 8x8 apart from their brightness and contrast, which follow them; by "
    "these a search chooses its source",
    "pixels": "the images at 8x8",
    **dict.fromkeys(RESNETS, "features of torchvision's network, trained on ImageNet"),
    f"{PREFIX}NAME": "features of that registered supernet (as in --source of transfer)",
    f"{RUN}ID": "features of the supernet of that search",
}


@dataclass(frozen=True)
class DistanceSettings:
    """What the entry point ``distance`` is asked for.

    Attributes:
        datasets: at least two, each once.
        features: one of FEATURES.
        config: how distances are computed.
        points: images of each set that are carried to the other sets.
        seed: decides which.
    """

    datasets: tuple[DataSettings, ...]
    features: str
    config: OTDDConfig
    points: int
    seed: int

    def __post_init__(self) -> None:
        names = [data.name for data in self.datasets]
        if len(set(names)) < len(names) or len(names) < 2:
            raise ConfigurationError(
                f"--datasets takes at least two different data sets with commas between them, "
                f"not '{','.join(names)}'"
            )
        if self.features not in FEATURES and not self.features.startswith((RUN, PREFIX)):
            raise UnknownNameError("features", self.features, FEATURES)


@dataclass(frozen=True)
class Distances:
    """OTDD of every pair in units of the features, float64 [sets, sets], and the sets' names."""

    names: tuple[str, ...]
    matrix: np.ndarray

    def metrics(self) -> dict[str, float]:
        """``otdd/FIRST/SECOND`` of each pair, in the order of the names."""
        numbered = list(enumerate(map(_metric_part, self.names)))
        return {
            f"otdd/{first}/{second}": float(self.matrix[i, j])
            for (i, first), (j, second) in combinations(numbered, 2)
        }


def measure(settings: DistanceSettings, machine: Machine) -> Distances:
    """Measure the distances of all pairs, log and show them.

    Raises:
        NASError: whatever a user can mend; the run is marked as FAILED with the reason.
    """
    names = short_names([data.name for data in settings.datasets])
    title = f"distance of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    with open_job(title, machine, {}, {}) as job:
        tasks = [job.load(data) for data in settings.datasets]
        embedding = _embedding(job, settings, tasks)
        say(f"features: {embedding.name}")
        sketches = []
        for task in tasks:
            job.log.log_dataset(task, "compared")
            sketches.append(describe_step(job, task, embedding, settings.points, settings.seed))
        distances = distance_step(job, names, sketches, settings.config)
        job.log.log_metrics(distances.metrics())
        job.log.describe(_markdown(distances))
        _say_nearest(distances)
        say(f"open the MLflow UI: {ui_command(job.log.tracker)}")
    return distances


def describe_step(
    job: Job, task: ImageTask, embedding: Embedding, points: int, seed: int
) -> DatasetSketch:
    """The sketch of ``task``, or that of a finished step with the same inputs."""
    title = f"describe {task.name}"

    def body(step: StepRun) -> Mapping[str, Any]:
        step.log.log_dataset(task, "compared")
        with watched(title, step.log) as observer, counting(title) as progress:
            sketch = describe(
                task, embedding, seed, points=points, observer=observer, progress=progress
            )
        save_sketch(step.directory / SKETCH_FILE, sketch)
        return {"sketch": sketch.digest}

    outcome = run_step(
        "describe",
        title,
        {"task": task.digest, "embedding": embedding.digest, "points": points, "seed": seed},
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        say=say,
    )
    return load_sketch(outcome.directory / SKETCH_FILE)


def distance_step(
    job: Job, names: Sequence[str], sketches: Sequence[DatasetSketch], config: OTDDConfig
) -> Distances:
    """All pairs; each is kept as soon as it is known, so that a killed step goes on there."""

    def body(step: StepRun) -> Mapping[str, Any]:
        started = time.perf_counter()
        matrix = _matrix(sketches, config, _cache(job, step))
        seconds = time.perf_counter() - started
        distances = Distances(tuple(names), matrix)
        _write_csv(step.directory / MATRIX_FILE, distances)
        step.log.log_figure(draw_distances(matrix, names), f"{PICTURES}/distances.png")
        step.log.log_figure(draw_map(matrix, names), f"{PICTURES}/map.png")
        return {"matrix": matrix.tolist(), "seconds": seconds}

    outcome = run_step(
        "distance",
        f"distance of {len(names)} data sets",
        {
            "names": list(names),
            "sketches": [sketch.digest for sketch in sketches],
            "config": asdict(config),
        },
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        say=say,
    )
    job.log.log_artifact(outcome.directory / MATRIX_FILE)
    job.log.log_artifact(outcome.directory / PICTURES, PICTURES)
    job.log.log_metrics({"cost/distance_seconds": outcome.results["seconds"]})
    return Distances(tuple(names), np.array(outcome.results["matrix"]))


def _cache(job: Job, step: StepRun) -> Path:
    """Of all jobs on this machine; of this step alone where nothing may be reused."""
    return step.checkpoint.with_name(DISTANCES) if job.machine.fresh else home() / DISTANCES


def _matrix(sketches: Sequence[DatasetSketch], config: OTDDConfig, cache: Path) -> np.ndarray:
    matrix = np.zeros((len(sketches), len(sketches)))
    pairs = list(combinations(range(len(sketches)), 2))
    with counting("distance") as progress:
        for done, (i, j) in enumerate(pairs):
            progress("pairs", done, len(pairs))
            value = cached_distance(sketches[i], sketches[j], config, cache)
            matrix[i, j] = matrix[j, i] = value
    return matrix


def _embedding(job: Job, settings: DistanceSettings, tasks: Sequence[ImageTask]) -> Embedding:
    if settings.features.startswith((RUN, PREFIX)):
        return _trunk_of(job, settings.features)
    made: dict[str, Callable[[], Embedding]] = {
        "shapes": shapes,
        "pixels": pixels,
        "pca": lambda: principal_components(tasks),
    }
    if settings.features in made:
        return made[settings.features]()
    return pretrained(settings.features, home() / "weights", job.device)


def _trunk_of(job: Job, name: str) -> Embedding:
    """Of a registered supernet, or of the one that the cells of a run come from."""
    tracker = job.log.tracker
    if name.startswith(RUN):
        entry = load_entry(past_search(tracker, name.removeprefix(RUN)).supernet_path)
    else:
        entry = load_stored(tracker, find_version(tracker, name)).entry
    supernet = entry.supernet.to(job.device)
    mixing = find_method(entry.card.method).mixing(supernet)
    return supernet_trunk(supernet, mixing, *entry.card.scale)


def short_names(names: Sequence[str]) -> list[str]:
    """Names for pictures and metrics: "folder:/data/pets" is "pets", a second one "pets-2"."""
    short: list[str] = []
    for name in names:
        plain = Path(name.removeprefix(FOLDER_PREFIX)).name or name
        number = 1 + sum(other == plain or other.startswith(f"{plain}-") for other in short)
        short.append(plain if number == 1 else f"{plain}-{number}")
    return short


def _metric_part(name: str) -> str:
    """A name as MLflow lets it stand in that of a metric."""
    return re.sub(r"[^A-Za-z0-9_. -]", "-", name)


def _write_csv(path: Path, distances: Distances) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", *distances.names])
        for name, row in zip(distances.names, distances.matrix.tolist(), strict=True):
            table.writerow([name, *row])


def _markdown(distances: Distances) -> str:
    """The matrix for the MLflow UI."""
    names = [name.replace("|", r"\|") for name in distances.names]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, distances.matrix, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{value:.4g}' for value in row)} |")
    return "\n".join(lines)


def _say_nearest(distances: Distances) -> None:
    for own, other in enumerate(nearest(distances.matrix)):
        value = distances.matrix[own, other]
        say(f"nearest to {distances.names[own]}: {distances.names[other]} at {value:.4g}")

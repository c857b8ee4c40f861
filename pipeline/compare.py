"""From an architecture to a registered network: train, compare with random, test, register.

The second half of every transfer, whichever way the architecture was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.architecture import Architecture
from nas.data import ImageTask
from nas.evaluation import count_macs, count_parameters
from nas.spaces import DartsSpace, find_space
from nas.statistics import (
    Interval,
    mean_interval,
    relative_improvement_interval,
    welch_difference,
)
from pipeline.console import Summary, human_count, say
from pipeline.evaluate import Tested, evaluation_step
from pipeline.figures import (
    NetworkAccuracies,
    draw_cells,
    draw_comparison,
    draw_learning_curves,
)
from pipeline.job import Job, ui_command
from pipeline.networks import RANDOM, TRANSFERRED, Trained, train_over_seeds, train_random
from pipeline.registry import Registered, register
from pipeline.settings import CompareSettings

SAMPLE_IMAGES = 4  # kept with the registered model as its input example


@dataclass(frozen=True)
class Comparison:
    """What a network came to on the target; accuracies are of the test split, 0..1."""

    accuracy: Interval
    random_accuracy: Interval
    improvement: Interval  # percent, papers: RI
    linear_accuracy: float
    best: Trained  # by validation accuracy; the one that is registered
    training_seconds: float  # of the transferred network, all seeds
    registered: Registered


def compare(
    job: Job, task: ImageTask, architecture: Architecture, settings: CompareSettings
) -> Comparison:
    """Train ``architecture`` over seeds and as many random ones, test all, register the best."""
    _say_size(architecture, task)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    transferred = train_over_seeds(job, task, architecture, settings.training, seeds)
    random = train_random(job, task, architecture, settings.training, settings.seeds, settings.seed)
    best = max(transferred, key=lambda trained: trained.validation_accuracy)
    networks = [*transferred, *random]
    tested = evaluation_step(job, task, networks, best)
    ours, theirs = tested.accuracies[: len(transferred)], tested.accuracies[len(transferred) :]
    accuracy, random_accuracy = mean_interval(ours), mean_interval(theirs)
    improvement = relative_improvement_interval(ours, theirs, settings.seed)
    _log_comparison(job, task, networks, tested, accuracy, random_accuracy, improvement)
    training_seconds = sum(trained.seconds for trained in transferred)
    job.log.log_metrics(
        {
            "val/accuracy": best.validation_accuracy,
            "params": best.parameters,
            "macs": best.macs,
            "cost/training_seconds": training_seconds,
            "cost/baseline_seconds": sum(trained.seconds for trained in random),
        }
    )
    registered = _register(job, task, best, settings.model_name, accuracy, random_accuracy)
    return Comparison(
        accuracy,
        random_accuracy,
        improvement,
        tested.linear,
        best,
        training_seconds,
        registered,
    )


def _say_size(architecture: Architecture, task: ImageTask) -> None:
    network = find_space(architecture.space).meta_network(architecture, task.shape, auxiliary=False)
    skeleton = architecture.skeleton
    say(
        f"network for {task.name}: {skeleton.cells} cells, {skeleton.channels} initial channels, "
        f"{human_count(count_parameters(network))} parameters, "
        f"{human_count(count_macs(network, task.shape))} multiply-adds"
    )


def _log_comparison(
    job: Job,
    task: ImageTask,
    networks: list[Trained],
    tested: Tested,
    accuracy: Interval,
    random_accuracy: Interval,
    improvement: Interval,
) -> None:
    metrics = {
        **_bounds("test/accuracy", accuracy),
        **_bounds("random/accuracy", random_accuracy),
        **_bounds("relative_improvement", improvement),
        "test/linear": tested.linear,
    }
    by_group: dict[str, list[float]] = {TRANSFERRED: [], RANDOM: []}
    for trained, value in zip(networks, tested.accuracies, strict=True):
        by_group[trained.group].append(value)
    if len(by_group[RANDOM]) > 1:
        metrics["p_value"] = welch_difference(by_group[TRANSFERRED], by_group[RANDOM]).p_value
    job.log.log_metrics({name: value for name, value in metrics.items() if np.isfinite(value)})
    rows = [NetworkAccuracies(group, group, tuple(values)) for group, values in by_group.items()]
    job.log.log_figure(draw_comparison(rows, tested.linear), "pictures/comparison.png")
    curves = draw_learning_curves({trained.label: trained.records for trained in networks})
    job.log.log_figure(curves, "pictures/learning_curves.png")
    job.log.log_json(
        {
            "target": task.name,
            "networks": [
                {
                    "label": trained.label,
                    "run": trained.run_id,
                    "architecture": trained.architecture.digest,
                    "validation_accuracy": trained.validation_accuracy,
                    "test_accuracy": value,
                    "parameters": trained.parameters,
                    "macs": trained.macs,
                    "seconds": trained.seconds,
                }
                for trained, value in zip(networks, tested.accuracies, strict=True)
            ],
        },
        "comparison.json",
    )


def _register(
    job: Job,
    task: ImageTask,
    best: Trained,
    name: str,
    accuracy: Interval,
    random_accuracy: Interval,
) -> Registered:
    """Register the network of the best validation accuracy."""
    architecture = best.architecture
    if architecture.space == "darts":
        genotype = DartsSpace().genotype(architecture)
        job.log.log_json(genotype.to_json(), "genotype.json")
        job.log.log_figure(draw_cells(genotype), "pictures/cells.png")
    job.log.log_json(architecture.to_json(), "architecture.json")
    job.log.set_tags({"lineage.training_run": best.run_id, "genotype.digest": architecture.digest})
    sample = task.images.gather(task.splits.val[:SAMPLE_IMAGES]).permute(0, 2, 3, 1)
    tags: Mapping[str, Any] = {
        "genotype_digest": architecture.digest,
        "macs": best.macs,
        "params": best.parameters,
        "test_accuracy": accuracy.mean,
        "random_accuracy": random_accuracy.mean,
    }
    registered = register(
        job.log,
        name,
        best.load().network,
        task,
        sample=sample.contiguous().numpy(),
        description=(
            f"A {architecture.space} network of {architecture.skeleton.cells} cells and "
            f"{architecture.skeleton.channels} channels for {task.name}: test accuracy "
            f"{accuracy.mean:.2%} over {accuracy.n} seeds, random networks "
            f"{random_accuracy.mean:.2%}. Takes raw uint8 images [N, H, W, C], returns "
            "probabilities."
        ),
        tags=tags,
        validation_accuracy=best.validation_accuracy,
        say=say,
    )
    job.log.set_tags(
        {
            "model.name": registered.name,
            "model.version": registered.version,
            "model.alias": registered.alias,
        }
    )
    return registered


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {
        name: interval.mean,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


def summarise(job: Job, task: ImageTask, architecture: str, comparison: Comparison) -> Summary:
    """The table that ends a job; ``architecture`` says what was trained."""
    best, registered = comparison.best, comparison.registered
    return Summary(
        target=task.name,
        architecture=architecture,
        accuracy=comparison.accuracy,
        random_accuracy=comparison.random_accuracy,
        improvement=comparison.improvement,
        linear_accuracy=comparison.linear_accuracy,
        parameters=best.parameters,
        macs=best.macs,
        model_name=registered.name,
        model_version=registered.version,
        model_alias=registered.alias,
        ui_command=ui_command(job.log.tracker),
    )

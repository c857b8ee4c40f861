"""From an architecture to a registered network: train, compare with random, test, register.

The second half of every transfer, whichever way the architecture was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from nas.architecture import Architecture
from nas.data import ImageTask
from nas.errors import TrackingError
from nas.evaluation import count_macs, count_parameters
from nas.spaces import DartsSpace, find_space
from nas.statistics import (
    Interval,
    mean_interval,
    relative_improvement_interval,
    welch_difference,
)
from pipeline.console import Summary, human_count, print_summary, say, summary_markdown
from pipeline.evaluate import evaluation_step
from pipeline.figures import (
    NetworkAccuracies,
    draw_cells,
    draw_comparison,
    draw_learning_curves,
)
from pipeline.job import Job, flat, ui_command
from pipeline.networks import RANDOM, TRANSFERRED, Trained, train_beside_random
from pipeline.registry import LINEAGE, Registered, as_it_stands, register
from pipeline.settings import CompareSettings
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.steps import StepRun, run_step, step_digest
from pipeline.tracking import RunLog

REGISTER = "register"  # the step that makes a version


@dataclass(frozen=True)
class Comparison:
    """What a network came to on the target; accuracies are of the test split, 0..1."""

    accuracy: Interval
    random_accuracy: Interval
    improvement: Interval  # percent, papers: RI
    linear_accuracy: float
    best: Trained  # by validation accuracy; the one that is registered
    best_accuracy: float  # its own
    training_seconds: float  # of the transferred network, all seeds


def compare(
    job: Job, task: ImageTask, architecture: Architecture, settings: CompareSettings
) -> Comparison:
    """Train ``architecture`` over seeds and as many random ones, test all, register the best."""
    _say_size(architecture, task)
    job.log.log_params(flat("network", asdict(architecture.skeleton)))
    seeds = range(settings.seed, settings.seed + settings.seeds)
    transferred, random = train_beside_random(job, task, architecture, settings.training, seeds)
    best = max(transferred, key=lambda trained: trained.validation_accuracy)
    tested = evaluation_step(job, task, [*transferred, *random], best)
    ours, theirs = tested.accuracies[: len(transferred)], tested.accuracies[len(transferred) :]
    comparison = Comparison(
        accuracy=mean_interval(ours),
        random_accuracy=mean_interval(theirs),
        improvement=relative_improvement_interval(ours, theirs),
        linear_accuracy=tested.linear,
        best=best,
        best_accuracy=ours[transferred.index(best)],
        training_seconds=sum(trained.seconds for trained in transferred),
    )
    _log_metrics(job, comparison, ours, theirs)
    job.log.log_metrics({"cost/baseline_seconds": sum(trained.seconds for trained in random)})
    _log_networks(job, task, dict(zip([*transferred, *random], tested.accuracies, strict=True)))
    _log_pictures(job, [*transferred, *random], ours, theirs, tested.linear)
    return comparison


def _say_size(architecture: Architecture, task: ImageTask) -> None:
    network = find_space(architecture.space).meta_network(architecture, task.shape, auxiliary=False)
    skeleton = architecture.skeleton
    say(
        f"network for {task.name}: {skeleton.cells} cells, {skeleton.channels} initial channels, "
        f"{human_count(count_parameters(network))} parameters, "
        f"{human_count(count_macs(network, task.shape))} multiply-adds"
    )


def _log_metrics(
    job: Job, comparison: Comparison, ours: Sequence[float], theirs: Sequence[float]
) -> None:
    metrics = {
        **_bounds("test/accuracy", comparison.accuracy),
        **_bounds("random/accuracy", comparison.random_accuracy),
        **_bounds("relative_improvement", comparison.improvement),
        "test/linear": comparison.linear_accuracy,
        "val/accuracy": comparison.best.validation_accuracy,
        "params": comparison.best.parameters,
        "macs": comparison.best.macs,
        "cost/training_seconds": comparison.training_seconds,
    }
    if all(len(set(accuracies)) > 1 for accuracies in (ours, theirs)):
        metrics["p_value"] = welch_difference(ours, theirs).p_value
    # one network a group has no interval
    job.log.log_metrics({name: value for name, value in metrics.items() if isfinite(value)})


def _log_networks(job: Job, task: ImageTask, tested: Mapping[Trained, float]) -> None:
    rows = [
        {
            "label": trained.label,
            "run": trained.run_id,
            "architecture": trained.architecture.digest,
            "validation_accuracy": trained.validation_accuracy,
            "test_accuracy": accuracy,
            "parameters": trained.parameters,
            "macs": trained.macs,
            "seconds": trained.seconds,
        }
        for trained, accuracy in tested.items()
    ]
    job.log.log_json({"target": task.name, "networks": rows}, "comparison.json")


def _log_pictures(
    job: Job,
    networks: Sequence[Trained],
    ours: tuple[float, ...],
    theirs: tuple[float, ...],
    linear: float,
) -> None:
    rows = [
        NetworkAccuracies(TRANSFERRED, TRANSFERRED, ours),
        NetworkAccuracies(RANDOM, RANDOM, theirs),
    ]
    job.log.log_figure(draw_comparison(rows, linear), "pictures/comparison.png")
    curves = draw_learning_curves({trained.label: trained.records for trained in networks})
    job.log.log_figure(curves, "pictures/learning_curves.png")


def register_step(job: Job, task: ImageTask, comparison: Comparison, name: str) -> Registered:
    """Register the transferred network of the best validation accuracy, once.

    A version that a killed attempt left behind is completed, unless ``--fresh`` forbids that.
    """
    best = comparison.best
    architecture = best.architecture
    job.log.log_json(architecture.to_json(), ARCHITECTURE_FILE)
    if architecture.space == "darts":
        genotype = DartsSpace().genotype(architecture)
        job.log.log_json(genotype.to_json(), "genotype.json")
        job.log.log_figure(draw_cells(genotype), "pictures/cells.png")
    job.log.set_tags(
        {"lineage.training_run": best.run_id, "genotype.digest": architecture.genotype_digest}
    )
    lineage = {key: value for key, value in job.log.tags().items() if key.startswith(LINEAGE)}

    inputs = {
        "name": name,
        "network": best.digest,
        "accuracy": comparison.accuracy.mean,
        "random_accuracy": comparison.random_accuracy.mean,
    }
    digest = step_digest(REGISTER, inputs)

    def body(step: StepRun) -> Mapping[str, Any]:
        fresh = job.machine.fresh
        return asdict(_register(step.log, task, comparison, name, digest, fresh))

    def run(fresh: bool) -> Registered | None:
        outcome = run_step(
            REGISTER,
            f"register {name}",
            inputs,
            body,
            parent=job.log,
            fresh=fresh,
            tags={"target": task.name, **lineage},
            say=say,
        )
        return as_it_stands(job.log.tracker, Registered(**outcome.results))

    registered = run(job.machine.fresh) or run(fresh=True)
    if registered is None:
        raise TrackingError(f"the new version of '{name}' vanished while it was registered")
    job.log.log_model_output(registered.model_id)
    job.log.set_tags(
        {
            "model.name": registered.name,
            "model.version": registered.version,
            "model.alias": registered.alias,
        }
    )
    return registered


def _register(
    log: RunLog, task: ImageTask, comparison: Comparison, name: str, step: str, fresh: bool
) -> Registered:
    best, accuracy = comparison.best, comparison.accuracy
    random_accuracy = comparison.random_accuracy
    skeleton = best.architecture.skeleton
    return register(
        log,
        name,
        best.load().network,
        task,
        step=step,
        fresh=fresh,
        sample=task.examples.permute(0, 2, 3, 1).contiguous().numpy(),
        description=(
            f"A {best.architecture.space} network of {skeleton.cells} cells and "
            f"{skeleton.channels} channels for {task.name}: test accuracy {accuracy.mean:.2%} "
            f"over {accuracy.n} seeds, random networks {random_accuracy.mean:.2%}. Takes raw "
            "uint8 images [N, H, W, C] of any height and width, returns probabilities "
            "[N, classes]."
        ),
        tags={
            "test_accuracy": comparison.best_accuracy,
            "test_accuracy_mean": accuracy.mean,
            "random_accuracy": random_accuracy.mean,
            "macs": best.macs,
            "params": best.parameters,
            "genotype_digest": best.architecture.genotype_digest,
        },
        validation_accuracy=best.validation_accuracy,
        say=say,
    )


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {
        name: interval.mean,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


def summarise(
    job: Job,
    task: ImageTask,
    architecture: str,
    comparison: Comparison,
    registered: Registered,
) -> Summary:
    """The table that ends a job; ``architecture`` says what was trained."""
    best = comparison.best
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


def finish(job: Job, summary: Summary) -> None:
    """End a job: the table on the console, and the same as the description of its run."""
    job.log.describe(summary_markdown(summary))
    print_summary(summary)

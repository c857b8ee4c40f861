"""From an architecture to a registered network: train, compare with random, test, register.

The second half of every transfer, whichever way the architecture was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nas.architecture import Architecture
from nas.data import ImageTask
from nas.spaces import DartsSpace
from nas.statistics import (
    Interval,
    mean_interval,
    relative_improvement_interval,
    welch_difference,
)
from pipeline.console import Summary, human_count, print_summary, say, summary_markdown
from pipeline.evaluate import CONFUSION, Tested, evaluation_step, with_bounds
from pipeline.figures import (
    NetworkAccuracies,
    draw_cells,
    draw_comparison,
    draw_learning_curves,
)
from pipeline.job import Job, flat, ui_command
from pipeline.networks import (
    RANDOM,
    TRANSFERRED,
    Trained,
    network_parameters,
    size_of,
    train_beside_random,
)
from pipeline.publishing import publish_step
from pipeline.registry import LINEAGE, Registered, register
from pipeline.searches import ALPHAS, PICTURES, Found
from pipeline.settings import CompareSettings
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.steps import StepRun
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


def compare(
    job: Job,
    task: ImageTask,
    architecture: Architecture,
    settings: CompareSettings,
    found: Found | None = None,
) -> Comparison:
    """Train ``architecture`` over seeds and as many random ones, test all, choose the best.

    Args:
        found: the search that the architecture comes from, where one is known. It is charged,
            also where an earlier job paid for it.
    """
    _say_size(architecture, task)
    job.log.log_params(network_parameters(architecture))
    job.log.set_tags({"lineage.target_digest": task.digest})
    training = settings.training_for(task)
    if training.epochs != settings.training.epochs:
        say(
            f"training takes {training.epochs} epochs instead of {settings.training.epochs}: the "
            f"set is small, and fewer than {settings.least_steps} steps teach a network little"
        )
    job.log.log_params(flat("train", training))
    seeds = range(settings.seed, settings.seed + settings.seeds)
    transferred, random = train_beside_random(job, task, architecture, training, seeds)
    best = max(transferred, key=lambda trained: trained.validation_accuracy)
    tested = evaluation_step(job, task, transferred, random, best)
    comparison = Comparison(
        accuracy=mean_interval(tested.transferred),
        random_accuracy=mean_interval(tested.random),
        improvement=relative_improvement_interval(tested.transferred, tested.random),
        linear_accuracy=tested.linear,
        best=best,
        best_accuracy=tested.model.mean,
    )
    _log_accuracies(job, comparison, transferred, tested)
    _log_costs(job, transferred, random, found)
    _log_networks(job, task, transferred, random, tested)
    _log_pictures(job, [*transferred, *random], tested, found)
    return comparison


def _say_size(architecture: Architecture, task: ImageTask) -> None:
    size, skeleton = size_of(architecture, task.shape), architecture.skeleton
    say(
        f"network for {task.name}: {skeleton.cells} cells, {skeleton.channels} initial channels, "
        f"{human_count(size.params)} parameters, {human_count(size.macs)} multiply-adds"
    )


def _log_accuracies(
    job: Job, comparison: Comparison, transferred: Sequence[Trained], tested: Tested
) -> None:
    best = comparison.best
    metrics = {
        **tested.metrics(),
        **with_bounds("relative_improvement", comparison.improvement),
        "val/accuracy": fmean(trained.validation_accuracy for trained in transferred),
        "model/val_accuracy": best.validation_accuracy,
        "params": best.parameters,
        "macs": best.macs,
    }
    if all(len(set(accuracies)) > 1 for accuracies in (tested.transferred, tested.random)):
        difference = welch_difference(tested.transferred, tested.random)
        metrics["relative_improvement_p_value"] = difference.p_value
    job.log.log_metrics(metrics)


def _log_costs(
    job: Job, transferred: Sequence[Trained], random: Sequence[Trained], found: Found | None
) -> None:
    training = sum(trained.seconds for trained in transferred)
    metrics = {
        "cost/training_seconds": training,
        "cost/baseline_seconds": sum(trained.seconds for trained in random),
    }
    if found is not None:
        metrics |= {**found.metrics(), "cost/transfer_seconds": found.seconds + training}
    job.log.log_metrics(metrics)


def _log_networks(
    job: Job,
    task: ImageTask,
    transferred: Sequence[Trained],
    random: Sequence[Trained],
    tested: Tested,
) -> None:
    networks, accuracies = [*transferred, *random], [*tested.transferred, *tested.random]
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
        for trained, accuracy in zip(networks, accuracies, strict=True)
    ]
    job.log.log_json({"target": task.name, "networks": rows}, "comparison.json")


def _log_pictures(
    job: Job, networks: Sequence[Trained], tested: Tested, found: Found | None
) -> None:
    rows = [
        NetworkAccuracies(TRANSFERRED, TRANSFERRED, tested.transferred),
        NetworkAccuracies(RANDOM, RANDOM, tested.random),
    ]
    job.log.log_figure(draw_comparison(rows, tested.linear), f"{PICTURES}/comparison.png")
    job.log.log_artifact(tested.directory / CONFUSION, PICTURES)
    if found is not None:
        job.log.log_artifact(found.directory / ALPHAS, PICTURES)
    curves = draw_learning_curves({trained.label: trained.records for trained in networks})
    job.log.log_figure(curves, f"{PICTURES}/learning_curves.png")


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
        job.log.log_figure(draw_cells(genotype), f"{PICTURES}/cells.png")
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

    def body(step: StepRun, digest: str, fresh: bool) -> Registered:
        return _register(step.log, task, comparison, name, digest, fresh)

    tags = {"target": task.name, **lineage}
    registered = publish_step(job, REGISTER, name, inputs, body, tags)
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


def summarise(
    job: Job,
    task: ImageTask,
    architecture: str,
    comparison: Comparison,
    registered: Registered,
    found: Found | None,
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
        source=found.source if found else None,
        search_seconds=found.seconds if found else None,
    )


def finish(job: Job, summary: Summary) -> None:
    """End a job: the table on the console, and the same as the description of its run."""
    job.log.describe(summary_markdown(summary))
    print_summary(summary)

"""The final evaluation: the one place where the test split is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.data import Batches, ImageTask, fit_linear
from nas.errors import ConfigurationError
from nas.evaluation import Evaluation, accuracy, confusion_matrix
from nas.statistics import Interval, mean_interval, proportion_interval
from pipeline.console import counting, say
from pipeline.figures import draw_confusion
from pipeline.job import Job, Machine, open_job
from pipeline.networks import Trained
from pipeline.registry import RegisteredNetwork, resolve
from pipeline.settings import DataSettings
from pipeline.steps import StepRun, run_step
from pipeline.tracking import RunLog

BATCH = 256
RAW_IMAGES = 32  # read together: photographs may have many megabytes each
CONFUSION = "pictures/confusion.png"


@dataclass(frozen=True)
class Tested:
    """Test accuracies (0..1).

    Attributes:
        transferred, random: one for each network, in the order given.
        model: of the network to register, with the interval for so many test images.
        linear: of a linear model.
        directory: artifacts of the step, to be read only.
    """

    transferred: tuple[float, ...]
    random: tuple[float, ...]
    model: Interval
    linear: float
    directory: Path

    def metrics(self) -> dict[str, float]:
        """By the names that runs share; the one that a comparison shows first stands first."""
        return {
            **with_bounds("test/accuracy", mean_interval(self.transferred)),
            **with_bounds("random/test_accuracy", mean_interval(self.random)),
            **with_bounds("model/test_accuracy", self.model),
            "linear/test_accuracy": self.linear,
        }


def with_bounds(name: str, interval: Interval) -> dict[str, float]:
    """``interval`` as metrics; of a single network there are no bounds."""
    values = {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {name: value for name, value in values.items() if isfinite(value)}


def evaluation_step(
    job: Job,
    task: ImageTask,
    transferred: Sequence[Trained],
    random: Sequence[Trained],
    chosen: Trained,
) -> Tested:
    """Test every network once; the confusion matrix is that of ``chosen``.

    ``chosen`` was picked by its validation accuracy before this step began.
    """
    title = f"evaluate on {task.name}"
    networks = [*transferred, *random]

    def body(step: StepRun) -> Mapping[str, Any]:
        step.log.log_dataset(task, "target")
        accuracies = []
        correct = 0
        with counting(title) as progress:
            for position, network in enumerate(networks):
                progress("networks tested", position, len(networks))
                evaluation = test(job, task, network)
                accuracies.append(evaluation.accuracy)
                if network is chosen:
                    correct = int((evaluation.predictions == evaluation.labels).sum())
                    _log_confusion(step.log, task, evaluation.labels, evaluation.predictions)
        results = {
            "transferred": accuracies[: len(transferred)],
            "random": accuracies[len(transferred) :],
            "correct": correct,
            "linear": fit_linear(task).accuracy(task, "test"),
        }
        step.log.log_metrics(_tested(task, results, step.directory).metrics())
        return results

    outcome = run_step(
        "evaluate",
        title,
        {
            "task": task.digest,
            "networks": [network.digest for network in networks],
            "chosen": chosen.digest,
        },
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        params={"target": task.name, "networks": len(networks)},
        tags={"target": task.name},
        say=say,
    )
    return _tested(task, outcome.results, outcome.directory)


def _tested(task: ImageTask, results: Mapping[str, Any], directory: Path) -> Tested:
    return Tested(
        transferred=tuple(results["transferred"]),
        random=tuple(results["random"]),
        model=proportion_interval(results["correct"], len(task.splits.test)),
        linear=results["linear"],
        directory=directory,
    )


def _log_confusion(log: RunLog, task: ImageTask, labels: Tensor, predictions: Tensor) -> None:
    matrix = confusion_matrix(labels, predictions, len(task.classes))
    log.log_figure(draw_confusion(matrix, task.classes), CONFUSION)


def test(job: Job, task: ImageTask, trained: Trained) -> Evaluation:
    """The trained network on the test split."""
    network = trained.load().network.to(memory_format=torch.channels_last).to(job.device)
    batches = Batches(
        task,
        task.splits.test,
        BATCH,
        seed=0,
        stream="test",
        device=job.device,
        workers=job.machine.workers,
    )
    return accuracy(network, batches.epoch())


@dataclass(frozen=True)
class EvaluateSettings:
    """What the entry point ``evaluate`` is asked for."""

    model: str
    target: DataSettings


def evaluate(settings: EvaluateSettings, machine: Machine) -> Interval:
    """Test a registered model, as anyone would use it, on the test split of ``target``.

    It is given the images as they came, unless ``target`` asks for a size.
    """
    with open_job(
        f"evaluate {settings.model}",
        machine,
        {"model": settings.model, "target": settings.target.name},
        {"target": settings.target.name},
    ) as job:
        model = resolve(job.log.tracker, settings.model)
        task = job.load(settings.target)
        _check_fit(model, task)
        job.log.log_dataset(task, "target")
        predictions = _predict(model, task, as_they_came=settings.target.image_size is None)
        labels = task.labels[task.splits.test]
        correct = int((predictions == labels).sum())
        interval = proportion_interval(correct, len(labels))
        _log_confusion(job.log, task, labels, predictions)
        job.log.log_metrics(with_bounds("model/test_accuracy", interval))
        job.log.set_tags(
            {
                "model.name": model.name,
                "model.version": model.version,
                "lineage.model_run": model.run_id,
            }
        )
        say(
            f"{model.name} version {model.version} on {task.name}: {interval.mean:.2%} of "
            f"{len(labels):,} test images [{interval.low:.2%}, {interval.high:.2%}]"
        )
        return interval


def _predict(model: RegisteredNetwork, task: ImageTask, *, as_they_came: bool) -> Tensor:
    """The class numbers that ``model`` gives the test split, int64 [N]."""
    read = task.images.originals if as_they_came else task.images.gather
    test = task.splits.test
    predictions = []
    with counting(f"test {model.name} on {task.name}") as progress:
        for start in range(0, len(test), RAW_IMAGES):
            progress("images tested", start, len(test))
            raw = read(test[start : start + RAW_IMAGES])
            images = [image.permute(1, 2, 0).numpy() for image in raw]
            predictions.append(model.predict(images).argmax(axis=1))
    return torch.from_numpy(np.concatenate(predictions))


def _check_fit(model: RegisteredNetwork, task: ImageTask) -> None:
    if model.classes != task.classes:
        raise ConfigurationError(
            f"the model knows the classes {', '.join(model.classes[:5])}..., {task.name} has "
            f"{', '.join(task.classes[:5])}...: evaluate it on the data it was trained for"
        )
    if model.channels != task.shape.channels:
        raise ConfigurationError(
            f"the model takes images of {model.channels} channel(s), those of {task.name} have "
            f"{task.shape.channels}: evaluate it on the data it was trained for"
        )

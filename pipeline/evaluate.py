"""The final evaluation: the one place where the test split is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.data import Batches, ImageTask, fit_linear
from nas.errors import ConfigurationError
from nas.evaluation import Evaluation, accuracy, confusion_matrix
from nas.statistics import Interval, proportion_interval
from pipeline.console import counting, say
from pipeline.figures import draw_confusion
from pipeline.job import Job, Machine, open_job
from pipeline.networks import Trained
from pipeline.registry import RegisteredNetwork, resolve
from pipeline.settings import DataSettings
from pipeline.steps import StepRun, run_step

BATCH = 256
RAW_IMAGES = 32  # read together: photographs may have many megabytes each


@dataclass(frozen=True)
class Tested:
    """Test accuracies (0..1): one for each network in the order given, and a linear model's."""

    run_id: str
    accuracies: tuple[float, ...]
    linear: float


def evaluation_step(
    job: Job, task: ImageTask, networks: Sequence[Trained], chosen: Trained
) -> Tested:
    """Test every network once; the confusion matrix is that of ``chosen``.

    ``chosen`` was picked by its validation accuracy before this step began.
    """
    title = f"evaluate on {task.name}"

    def body(step: StepRun) -> Mapping[str, Any]:
        step.log.log_dataset(task, "target")
        accuracies = []
        with counting(title) as progress:
            for position, network in enumerate(networks):
                progress("networks tested", position, len(networks))
                evaluation = test(job, task, network)
                accuracies.append(evaluation.accuracy)
                name = f"test/{network.group}"
                step.log.log_metrics({name: evaluation.accuracy}, step=position)
                if network is chosen:
                    _log_chosen(step, task, evaluation)
        linear = fit_linear(task).accuracy(task, "test")
        step.log.log_metrics({"test/linear": linear})
        return {"accuracies": accuracies, "linear": linear}

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
    results = outcome.results
    return Tested(outcome.run_id, tuple(results["accuracies"]), results["linear"])


def _log_chosen(step: StepRun, task: ImageTask, evaluation: Evaluation) -> None:
    matrix = confusion_matrix(evaluation.labels, evaluation.predictions, len(task.classes))
    step.log.log_figure(draw_confusion(matrix, task.classes), "pictures/confusion.png")
    step.log.log_metrics({"test/accuracy": evaluation.accuracy})


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
        matrix = confusion_matrix(labels, predictions, len(task.classes))
        job.log.log_figure(draw_confusion(matrix, task.classes), "pictures/confusion.png")
        job.log.log_metrics(
            {
                "test/accuracy": interval.mean,
                "test/accuracy_low": interval.low,
                "test/accuracy_high": interval.high,
            }
        )
        job.log.set_tags({"model.version": model.version, "lineage.model_run": model.run_id})
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

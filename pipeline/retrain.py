"""Train a given architecture on a data set, compare it with random ones, and register it."""

from __future__ import annotations

from dataclasses import dataclass

from nas.architecture import Skeleton
from nas.data import ImageTask
from pipeline.compare import Comparison, compare, finish, register_step, summarise
from pipeline.job import Job, Machine, flat, open_job
from pipeline.settings import CompareSettings, DataSettings, StackSettings
from pipeline.specification import RUN, read_architecture


@dataclass(frozen=True)
class RetrainSettings:
    """What the entry point ``retrain`` is asked for.

    ``architecture`` is a published genotype, a file or ``run:ID``; ``skeleton`` is for those that
    have none of their own, and ``stack`` what the user wants instead.
    """

    architecture: str
    target: DataSettings
    skeleton: Skeleton
    stack: StackSettings
    compare: CompareSettings


def retrain(settings: RetrainSettings, machine: Machine) -> Comparison:
    """Train, compare and register; prints what came of it."""
    target_name = settings.target.name
    with open_job(
        f"retrain {settings.architecture} on {target_name}",
        machine,
        {
            "architecture": settings.architecture,
            "target": target_name,
            "seed": settings.compare.seed,
            "seeds": settings.compare.seeds,
            **flat("train", settings.compare.training),
        },
        {"space": "darts", "target": target_name},
    ) as job:
        given = read_architecture(settings.architecture, settings.skeleton, job.log.tracker)
        task = job.load(settings.target)
        job.log.log_dataset(task, "target")
        job.log.set_tags(_lineage(job, settings.architecture, task))
        comparison = compare(job, task, settings.stack.apply(given, task), settings.compare)
        registered = register_step(job, task, comparison, settings.compare.model_name)
        finish(job, summarise(job, task, settings.architecture, comparison, registered))
    return comparison


def _lineage(job: Job, architecture: str, task: ImageTask) -> dict[str, str]:
    tags = {"lineage.architecture": architecture, "lineage.target_digest": task.digest}
    if architecture.startswith(RUN):
        run_id = architecture.removeprefix(RUN)
        run = job.log.tracker.run(run_id)
        # a job names the search step in it; a search step is the search itself
        tags["lineage.search_run"] = run.tags.get("lineage.search_run", run_id) if run else run_id
    return tags

"""Train a given architecture on a data set, compare it with random ones, and register it."""

from __future__ import annotations

from dataclasses import dataclass

from nas.architecture import Skeleton
from nas.errors import TrackingError
from pipeline.compare import Comparison, compare, finish, register_step, summarise
from pipeline.console import say
from pipeline.job import Job, Machine, open_job
from pipeline.searches import Found, past_search, take_in
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
        },
        {"space": "darts", "target": target_name},
    ) as job:
        name = settings.architecture
        given = read_architecture(name, settings.skeleton, job.log.tracker)
        task = job.load(settings.target)
        job.log.log_dataset(task, "target")
        job.log.set_tags({"lineage.architecture": name})
        found = _search_behind(job, name)
        architecture = settings.stack.apply(given, task)
        comparison = compare(job, task, architecture, settings.compare, found)
        registered = register_step(job, task, comparison, settings.compare.model_name)
        finish(job, summarise(job, task, name, comparison, registered, found))
    return comparison


def _search_behind(job: Job, architecture: str) -> Found | None:
    """The search that found the cells, taken in as a transfer does; None where none is known."""
    if not architecture.startswith(RUN):
        return None
    try:
        found = past_search(job.log.tracker, architecture.removeprefix(RUN))
    except TrackingError as error:
        say(f"the search behind {architecture} is neither an input nor charged: {error}")
        return None
    job.log.log_datasets_of(found.run_id)
    take_in(job, found)
    return found

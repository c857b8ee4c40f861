"""The way back from a registered network: its run, the steps before it, their data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nas.errors import TrackingError
from pipeline.inputs import DatasetSummary
from pipeline.registry import LINEAGE, find_version, logged_model_id
from pipeline.tracking import RunSummary, Tracker

REUSED = "reused."  # a parent's tags that name the runs it took over from earlier jobs


@dataclass(frozen=True)
class Lineage:
    """Where a registered version came from.

    Attributes:
        run: the run that made the network.
        job: the outermost run around it.
        steps: the job's nested runs, those it reused, and every run that a ``lineage.*`` tag
            names, with what is nested in them.
        datasets: the inputs of all these runs.
        tags: the version's tags: genotype and data-set digests, accuracy, ``lineage.*``.
    """

    name: str
    version: str
    model_id: str
    run: RunSummary
    job: RunSummary
    steps: tuple[RunSummary, ...]
    datasets: tuple[DatasetSummary, ...]
    tags: Mapping[str, str]


def lineage(tracker: Tracker, uri: str) -> Lineage:
    """Walk back from the registered version that ``uri`` names, as ``models:/NAME@champion``.

    Raises:
        TrackingError: there is no such version, or its run was deleted.
    """
    version = find_version(tracker, uri)
    run = tracker.run(version.run_id or "")
    if run is None:
        raise TrackingError(f"the run that made {uri} is gone, and with it the way back")
    job = _outermost(tracker, run)
    found = {summary.run_id: summary for summary in _walk(tracker, job, version.tags)}
    datasets = dict.fromkeys(data for summary in found.values() for data in summary.datasets)
    return Lineage(
        name=version.name,
        version=str(version.version),
        model_id=logged_model_id(version),
        run=run,
        job=job,
        steps=tuple(summary for run_id, summary in found.items() if run_id != job.run_id),
        datasets=tuple(datasets),
        tags=dict(version.tags),
    )


def _outermost(tracker: Tracker, run: RunSummary) -> RunSummary:
    while run.parent_id is not None:
        parent = tracker.run(run.parent_id)
        if parent is None:
            break
        run = parent
    return run


def _walk(
    tracker: Tracker, job: RunSummary, version_tags: Mapping[str, str]
) -> Iterator[RunSummary]:
    """The job, then every run that can be reached from it, each once."""
    queue, seen = [job], {job.run_id}
    linked = list(_linked(version_tags))
    while queue:
        run = queue.pop(0)
        yield run
        named = (tracker.run(run_id) for run_id in [*linked, *_linked(run.tags)])
        for other in [*tracker.children(run.run_id), *filter(None, named)]:
            if other.run_id not in seen:
                seen.add(other.run_id)
                queue.append(other)
        linked = []


def _linked(tags: Mapping[str, str]) -> Iterator[str]:
    """Run ids in tags such as ``reused.search`` and ``lineage.search_run``."""
    for key, value in tags.items():
        if key.startswith(REUSED) or (key.startswith(LINEAGE) and key.endswith("_run")):
            yield from filter(None, value.split(","))

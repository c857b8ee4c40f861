"""Where a search begins: with the nearest supernet of the zoo, a named one, or from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from nas.data import ImageTask
from nas.errors import CheckpointError, TrackingError
from nas.search import SearchConfig
from nas.spaces import DartsSpace
from nas.transfer.nearest import MAX_OVERLAP, Standing, Target, appraise, rank
from nas.transfer.otdd import DatasetSketch, describe
from nas.transfer.supernet import WarmStartOptions, require_compatible
from nas.transfer.zoo import ZooEntry, file_digest, image_hashes, load_entry, overlap
from pipeline.console import counting, print_ranking, say
from pipeline.job import Job, RunObserver
from pipeline.publishing import publish_step
from pipeline.registry import Registered, find_version, logged_model_id
from pipeline.searches import Found, past_search
from pipeline.settings import DataSettings
from pipeline.specification import RUN
from pipeline.steps import StepRun
from pipeline.zoo import (
    EMBEDDING,
    Beginning,
    known_distance,
    load_stored,
    misfit,
    publish_supernet,
    registered_supernets,
    supernet_name,
)

AUTO = "auto"
RANKING = "ranking.json"
CONTRIBUTE = "contribute"  # the step that registers a supernet


@dataclass(frozen=True)
class WarmSettings:
    """What a search shall begin with.

    Attributes:
        source: "auto", a data set, a registered supernet ("supernet-digits", with "/3" or
            "@champion" after it), or "run:ID" of a search.
        data: the data set, where ``source`` is one: it is searched first.
    """

    source: str
    data: DataSettings | None
    options: WarmStartOptions


def begin(
    job: Job,
    task: ImageTask,
    settings: WarmSettings,
    config: SearchConfig,
    search: Callable[[DataSettings], Found],
) -> Beginning | None:
    """The supernet that a search on ``task`` begins with; None is from scratch.

    Args:
        config: of the search, as it runs from scratch.
        search: searches a data set that ``settings`` names, or takes over an earlier search.

    Raises:
        CheckpointError: what was named does not fit, or its file is damaged.
        ConfigurationError: the search has too few stages for what is asked.
        TrackingError: it is not there, or the registry does not answer.
    """
    source, tracker = settings.source, job.log.tracker
    supernet = settings.options.adapted(config).supernet_of(0)
    required = settings.options.required(DartsSpace().signature(supernet))
    if source == AUTO:
        beginning = _nearest(job, task, required, settings.options)
    elif settings.data is not None:
        found = search(settings.data)
        beginning = _of_search(found, f"the search on {found.source}", task, settings.options)
    elif source.startswith(RUN):
        found = past_search(tracker, source.removeprefix(RUN))
        beginning = _of_search(found, f"run {found.run_id[:8]}", task, settings.options)
    else:
        beginning = _registered(job, source, task, settings.options)
    if beginning is None:
        return None
    require_compatible(beginning.entry.supernet.signature(), required)
    if beginning.overlap > MAX_OVERLAP:
        share = f"{beginning.overlap:.1%} of these images"
        warning = f"{beginning.title}, or what it began with, was searched on {share}"
        RunObserver(job.log).on_warning("overlap", warning)
        say(f"warning: {warning}: it shows how well a set teaches itself")
    job.log.set_tags(beginning.lineage())
    job.log.log_metrics(beginning.metrics())
    job.log.log_model_input(beginning.model_id)
    say(f"beginning with {beginning.title}, searched on {beginning.sources}")
    return beginning


def contribute(job: Job, tasks: Sequence[ImageTask], found: Found) -> Registered:
    """Register the supernet that was searched on ``tasks``, for later searches to begin with."""
    name = supernet_name([task.name for task in tasks])
    inputs = {
        "name": name,
        "supernet": file_digest(found.supernet_path),
        "embedding": EMBEDDING.digest,
    }

    def body(step: StepRun, digest: str, fresh: bool) -> Registered:
        return publish_supernet(
            step.log,
            name,
            found.supernet_path,
            lambda: [_describe(job, task) for task in tasks],
            step=digest,
            fresh=fresh,
            say=say,
        )

    tags = {"source": found.source, "method": found.method, "lineage.search_run": found.run_id}
    registered = publish_step(job, CONTRIBUTE, name, inputs, body, tags)
    known = job.log.tags().get("supernet.versions", "").split(",")
    versions = [*filter(None, known), f"{registered.name}/{registered.version}"]
    job.log.set_tags({"supernet.versions": ",".join(dict.fromkeys(versions))})
    say(f"registered {registered.name} version {registered.version} ({registered.alias})")
    return registered


def _nearest(
    job: Job, task: ImageTask, required: Mapping[str, Any], options: WarmStartOptions
) -> Beginning | None:
    """The nearest compatible supernet of the registry, once the ranking was shown."""
    tracker = job.log.tracker
    known = registered_supernets(tracker)
    versions = [version for version in known if not misfit(version, required)]
    standings = _appraised(job, task, versions) if versions else []
    ranked = rank(standings)
    _report(job, ranked)
    if not ranked or ranked[0].refused:
        why = "none of them may be taken" if ranked else _nothing_fits(known, required)
        say(f"searching from scratch: {why}")
        return None
    best = ranked[0]
    version = versions[[standing.name for standing in standings].index(best.name)]
    entry = load_stored(tracker, version).entry
    return Beginning(
        title=best.name,
        entry=entry,
        digest=version.tags["supernet.digest"],
        options=options,
        run_id=version.tags.get("lineage.search_run", version.run_id or ""),
        model_id=logged_model_id(version),
        distance=best.distance if math.isfinite(best.distance) else None,
        overlap=best.overlap,
    )


def _nothing_fits(known: Sequence[ModelVersion], required: Mapping[str, Any]) -> str:
    """What is said where the registry has no supernet for a search."""
    if not known:
        return "no supernet is registered"
    newest = known[0]
    return (
        f"none of the registered supernets ({len(known)}) fits; the newest, {newest.name} version "
        f"{newest.version}: {misfit(newest, required)}"
    )


def _appraised(job: Job, task: ImageTask, versions: Sequence[ModelVersion]) -> list[Standing]:
    """Where each of ``versions`` stands for ``task``."""
    target, measure = _target(job, task), partial(known_distance, fresh=job.machine.fresh)
    standings = []
    with counting("ranking") as progress:
        for done, version in enumerate(versions):
            progress("supernets", done, len(versions))
            title = f"{version.name} version {version.version}"
            try:
                stored = load_stored(job.log.tracker, version)
            except (CheckpointError, TrackingError) as error:  # others may be sound
                refused = f"cannot be read: {error}"
                sources = tuple(version.tags.get("dataset", "").split(", "))
                standings.append(Standing(title, sources, math.inf, 0.0, refused))
                continue
            card, hashes = stored.entry.card, stored.entry.hashes
            standings.append(appraise(title, card, hashes, stored.sketches, target, measure))
    return standings


def _report(job: Job, ranked: Sequence[Standing]) -> None:
    """Show the ranking, and keep it as an artifact."""
    if ranked:
        print_ranking(ranked)
    rows = [
        {
            "supernet": standing.name,
            "sources": list(standing.sources),
            "distance": standing.distance if math.isfinite(standing.distance) else None,
            "overlap": standing.overlap,
            "refused": standing.refused,
        }
        for standing in ranked
    ]
    job.log.log_json({"embedding": EMBEDDING.name, "supernets": rows}, RANKING)


def _registered(job: Job, name: str, task: ImageTask, options: WarmStartOptions) -> Beginning:
    version = find_version(job.log.tracker, name)
    entry = load_stored(job.log.tracker, version).entry
    return Beginning(
        title=f"{version.name} version {version.version}",
        entry=entry,
        digest=version.tags["supernet.digest"],
        options=options,
        run_id=version.tags.get("lineage.search_run", version.run_id or ""),
        model_id=logged_model_id(version),
        distance=None,
        overlap=_overlap(entry, task),
    )


def _of_search(found: Found, title: str, task: ImageTask, options: WarmStartOptions) -> Beginning:
    entry = load_entry(found.supernet_path)
    return Beginning(
        title=title,
        entry=entry,
        digest=file_digest(found.supernet_path),
        options=options,
        run_id=found.run_id,
        model_id=found.supernet_id,
        distance=None,
        overlap=_overlap(entry, task),
    )


def _overlap(entry: ZooEntry, task: ImageTask) -> float:
    return overlap(image_hashes(task), entry.hashes)


def _target(job: Job, task: ImageTask) -> Target:
    return Target(task.name, task.digest, image_hashes(task), _describe(job, task))


def _describe(job: Job, task: ImageTask) -> DatasetSketch:
    with counting(f"describing {task.name}") as progress:
        return describe(task, EMBEDDING, 0, progress=progress, observer=RunObserver(job.log))

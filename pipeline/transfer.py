"""The main job: search, move what was found to the target, train, compare, register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nas.architecture import Architecture
from nas.data import ImageTask, fit_linear
from nas.errors import UnknownNameError
from nas.ops.backend import Backend
from nas.search import Method, SearchConfig
from pipeline.compare import compare, finish, register_step, summarise
from pipeline.console import Summary
from pipeline.job import Job, Machine, flat, open_job
from pipeline.searches import Found, pick_backend, search_step, take_in
from pipeline.settings import CompareSettings, DataSettings, StackSettings
from pipeline.warm import WarmSettings, begin, contribute
from pipeline.zoo import check_registry

SCRATCH = "scratch"  # the source of a search that began with no other supernet


@dataclass(frozen=True)
class TransferSettings:
    """What a transfer is asked to do.

    Attributes:
        source: the data set to search on; None where ``warm`` names something else to begin with.
        warm: what the `supernet` transfer begins with.
        contribute: register the supernet of the search.
    """

    transfer: str
    source: DataSettings | None
    target: DataSettings
    method: Method
    search: SearchConfig
    stack: StackSettings
    compare: CompareSettings
    warm: WarmSettings
    contribute: bool = False


@dataclass(frozen=True)
class Moved:
    """What came over to the target.

    Attributes:
        searched: the data set that the search was on.
        target: the data set that the network is for.
        source: what the knowledge came from, for people.
        linear: accuracy of a linear model on the source's validation split, where there is one.
    """

    found: Found
    searched: ImageTask
    target: ImageTask
    architecture: Architecture
    source: str
    linear: float | None = None


def transfer_cell(job: Job, settings: TransferSettings, backend: Backend) -> Moved:
    """NASTransfer: the discrete cells of a search on the source, stacked anew for the target."""
    assert settings.source is not None
    source, target = job.load(settings.source), job.load(settings.target)
    settings.stack.check(target)
    job.log.log_dataset(source, "source")
    job.log.log_dataset(target, "target")
    found = _search(job, settings, source, settings.search, backend)
    architecture = settings.stack.apply(found.architecture, target)
    take_in(job, found)
    linear = fit_linear(source).accuracy(source, "val")
    return Moved(found, source, target, architecture, found.source, linear)


def transfer_supernet(job: Job, settings: TransferSettings, backend: Backend) -> Moved:
    """Supernet transfer: a search on the target that begins with the supernet of another set."""
    target = job.load(settings.target)
    settings.stack.check(target)
    job.log.log_dataset(target, "target")

    def search_source(data: DataSettings) -> Found:
        source = job.load(data)
        job.log.log_dataset(source, "source")
        return _search(job, settings, source, settings.search, backend)

    warm = settings.warm
    start = begin(job, target, warm, settings.search, search_source)
    config = warm.options.adapted(settings.search) if start else settings.search
    found = search_step(
        job, [target], settings.method, config, settings.compare.seed, backend, start=start
    )
    architecture = settings.stack.apply(found.architecture, target)
    take_in(job, found)
    job.log.set_tags({"source": start.sources if start else SCRATCH})
    source = f"{start.title} ({start.sources})" if start else SCRATCH
    return Moved(found, target, target, architecture, source)


def _search(
    job: Job,
    settings: TransferSettings,
    task: ImageTask,
    config: SearchConfig,
    backend: Backend,
) -> Found:
    return search_step(job, [task], settings.method, config, settings.compare.seed, backend)


# How knowledge moves from the search to the target; one row for each paper.
TRANSFERS: dict[str, Callable[[Job, TransferSettings, Backend], Moved]] = {
    "cell": transfer_cell,
    "supernet": transfer_supernet,
}


def transfer(settings: TransferSettings, machine: Machine) -> Summary:
    """Run the main job and print what came of it.

    Raises:
        NASError: whatever a user can mend; the run is marked as FAILED with the reason.
    """
    if settings.transfer not in TRANSFERS:
        raise UnknownNameError("transfer", settings.transfer, TRANSFERS)
    backend = pick_backend(machine)
    source_name = settings.source.name if settings.source else settings.warm.source
    target_name = settings.target.name
    tags = {
        "space": "darts",
        "method": settings.method.name,
        "transfer": settings.transfer,
        "source": source_name,
        "target": target_name,
    }
    how = f"{settings.method.name}, seed {settings.compare.seed}"
    title = f"transfer {source_name} to {target_name} ({how})"
    with open_job(title, machine, _parameters(settings, source_name), tags) as job:
        check_registry()  # known before anything is paid for, as it is needed at the end
        moved = TRANSFERS[settings.transfer](job, settings, backend)
        target, found = moved.target, moved.found
        if settings.contribute:
            contribute(job, [moved.searched], found)
        comparison = compare(job, target, moved.architecture, settings.compare, found)
        registered = register_step(job, target, comparison, settings.compare.model_name)
        architecture_name = f"{settings.method.name}, {settings.transfer} transfer"
        summary = replace(
            summarise(job, target, architecture_name, comparison, registered, found),
            source=moved.source,
            linear_source_accuracy=moved.linear,
        )
        finish(job, summary)
    return summary


def _parameters(settings: TransferSettings, source: str) -> dict[str, object]:
    return {
        "transfer": settings.transfer,
        "source": source,
        "target": settings.target.name,
        "method": settings.method.name,
        "seed": settings.compare.seed,
        "seeds": settings.compare.seeds,
        **flat("search", settings.search),
    }

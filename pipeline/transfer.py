"""The main job: search on a source, move what was found to the target, train, compare, register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nas.architecture import Architecture
from nas.data import ImageTask, fit_linear
from nas.errors import UnknownNameError
from nas.search import Method, SearchConfig
from pipeline.compare import compare, finish, register_step, summarise
from pipeline.console import Summary
from pipeline.job import Machine, flat, open_job
from pipeline.search import Found, pick_backend, search_step, take_in
from pipeline.settings import CompareSettings, DataSettings, StackSettings


@dataclass(frozen=True)
class TransferSettings:
    """What a transfer is asked to do."""

    transfer: str
    source: DataSettings
    target: DataSettings
    method: Method
    search: SearchConfig
    stack: StackSettings
    compare: CompareSettings


def transfer_cell(found: Found, target: ImageTask, settings: TransferSettings) -> Architecture:
    """NASTransfer: the discrete cells, stacked anew for the target."""
    return settings.stack.apply(found.architecture, target)


# How knowledge moves from the search to the target; one row for each paper.
TRANSFERS: dict[str, Callable[[Found, ImageTask, TransferSettings], Architecture]] = {
    "cell": transfer_cell,
}


def transfer(settings: TransferSettings, machine: Machine) -> Summary:
    """Run the main job and print what came of it.

    Raises:
        NASError: whatever a user can mend; the run is marked as FAILED with the reason.
    """
    if settings.transfer not in TRANSFERS:
        raise UnknownNameError("transfer", settings.transfer, TRANSFERS)
    backend = pick_backend(machine)
    source_name, target_name = settings.source.name, settings.target.name
    tags = {
        "space": "darts",
        "method": settings.method.name,
        "transfer": settings.transfer,
        "source": source_name,
        "target": target_name,
    }
    how = f"{settings.method.name}, seed {settings.compare.seed}"
    title = f"transfer {source_name} to {target_name} ({how})"
    with open_job(title, machine, _parameters(settings), tags) as job:
        source, target = job.load(settings.source), job.load(settings.target)
        settings.stack.check(target)
        job.log.log_dataset(source, "source")
        job.log.log_dataset(target, "target")
        seed = settings.compare.seed
        found = search_step(job, source, settings.method, settings.search, seed, backend)
        architecture = TRANSFERS[settings.transfer](found, target, settings)
        take_in(job, found)
        comparison = compare(job, target, architecture, settings.compare, found)
        registered = register_step(job, target, comparison, settings.compare.model_name)
        architecture_name = f"{settings.method.name}, {settings.transfer} transfer"
        summary = replace(
            summarise(job, target, architecture_name, comparison, registered, found),
            linear_source_accuracy=fit_linear(source).accuracy(source, "val"),
        )
        finish(job, summary)
    return summary


def _parameters(settings: TransferSettings) -> dict[str, object]:
    return {
        "transfer": settings.transfer,
        "source": settings.source.name,
        "target": settings.target.name,
        "method": settings.method.name,
        "seed": settings.compare.seed,
        "seeds": settings.compare.seeds,
        **flat("search", settings.search),
        **flat("train", settings.compare.training),
    }

"""Search supernets on one or many data sets and register them, for other searches to begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nas.data import ImageTask
from nas.errors import ConfigurationError
from nas.search import Method, SearchConfig
from nas.search.sources import joint_shape
from pipeline.console import say
from pipeline.job import Machine, flat, open_job
from pipeline.registry import Registered
from pipeline.searches import pick_backend, search_step
from pipeline.settings import DataSettings
from pipeline.warm import contribute
from pipeline.zoo import check_registry


@dataclass(frozen=True)
class PretrainSettings:
    """What the entry point ``pretrain`` is asked for.

    Attributes:
        sources: the data sets; several share one supernet.
        each: of several, also a supernet for each alone.
        sampling: how a step of the shared one chooses its data set.
    """

    sources: tuple[DataSettings, ...]
    method: Method
    config: SearchConfig
    seed: int
    sampling: str
    each: bool

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(
                f"--sources names one data set or several different ones, separated by commas, not "
                f"{','.join(names) or 'none'!r}"
            )


def pretrain(settings: PretrainSettings, machine: Machine) -> list[Registered]:
    """Search and register: the supernet that the sources share, and with ``each`` one of each."""
    backend = pick_backend(machine)
    names = ",".join(source.name for source in settings.sources)
    method = settings.method
    params = {
        "sources": names,
        "method": method.name,
        "seed": settings.seed,
        **flat("search", settings.config),
    }
    tags = {"space": "darts", "method": method.name, "source": names}
    registered = []
    with open_job(f"pretrain on {names}", machine, params, tags) as job:
        check_registry()
        tasks = [job.load(source) for source in settings.sources]
        joint_shape(tasks)  # refused before anything is paid for
        for task in tasks:
            job.log.log_dataset(task, "source")
        seconds, epochs = 0.0, 0
        for group in _groups(tasks, settings.each):
            found = search_step(
                job,
                group,
                method,
                settings.config,
                settings.seed,
                backend,
                sampling=settings.sampling,
            )
            registered.append(contribute(job, group, found))
            seconds, epochs = seconds + found.seconds, epochs + found.epochs
            if len(group) == len(tasks):
                job.log.log_metrics({"supernet/val_accuracy": found.validation_accuracy})
        job.log.log_metrics({"cost/search_seconds": seconds, "cost/search_epochs": epochs})
        options = f"--transfer supernet --source auto --method {method.name}"
        say(f"a transfer of the same preset begins with the nearest supernet by {options}")
    return registered


def _groups(tasks: Sequence[ImageTask], each: bool) -> Iterator[Sequence[ImageTask]]:
    """What is searched together."""
    if each and len(tasks) > 1:
        yield from ([task] for task in tasks)
    yield tasks

"""Search an architecture on a data set, from scratch or from a supernet of another one."""

from __future__ import annotations

from dataclasses import dataclass

from nas.search import Method, SearchConfig
from pipeline.console import human_seconds, say
from pipeline.job import Machine, flat, open_job
from pipeline.searches import (
    GENOTYPE_FILE,
    PICTURES,
    Found,
    log_network,
    pick_backend,
    search_step,
    take_in,
)
from pipeline.settings import DataSettings
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.warm import WarmSettings, begin, contribute
from pipeline.zoo import check_registry


@dataclass(frozen=True)
class SearchSettings:
    """What the entry point ``search`` is asked for.

    ``warm`` is what to begin with, None from scratch; ``contribute`` registers the supernet.
    """

    source: DataSettings
    method: Method
    config: SearchConfig
    seed: int
    warm: WarmSettings | None = None
    contribute: bool = False


def search(settings: SearchSettings, machine: Machine) -> Found:
    """Search on one data set and say what was found."""
    name, method, seed = settings.source.name, settings.method, settings.seed
    backend = pick_backend(machine)
    with open_job(
        f"search {name}",
        machine,
        {"source": name, "method": method.name, "seed": seed, **flat("search", settings.config)},
        {"space": "darts", "method": method.name, "source": name},
    ) as job:
        if settings.contribute:
            check_registry()  # known before anything is paid for
        task = job.load(settings.source)

        def search_source(data: DataSettings) -> Found:
            return search_step(job, [job.load(data)], method, settings.config, seed, backend)

        warm = settings.warm
        start = None
        if warm is not None:
            start = begin(job, task, warm, settings.config, search_source)
        config = warm.options.adapted(settings.config) if warm and start else settings.config
        found = search_step(job, [task], method, config, seed, backend, start=start)
        job.log.log_dataset(task, "source")
        job.log.log_json(found.genotype.to_json(), GENOTYPE_FILE)
        job.log.log_json(found.architecture.to_json(), ARCHITECTURE_FILE)
        job.log.log_artifact(found.directory / PICTURES, PICTURES)
        job.log.log_metrics(found.metrics())
        log_network(job.log, task.shape, found.architecture)
        take_in(job, found)
        if settings.contribute:
            contribute(job, [task], found)
        say(f"found in {human_seconds(found.seconds)}: {found.genotype.to_json()}")
        say(f"train it: python -m pipeline retrain --architecture run:{job.log.run_id}")
    return found

"""Search an architecture on a source data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas.architecture import Architecture, Skeleton
from nas.data import ImageTask
from nas.ops.mixed import OPERATIONS
from nas.search import BilevelSearch, Method, SearchConfig, SearchResult
from nas.spaces import DartsSpace
from nas.spaces.darts import Genotype
from nas.trained import save_supernet
from pipeline.console import human_seconds, say
from pipeline.figures import draw_alphas, draw_cells, draw_search_curves
from pipeline.job import Job, Machine, flat, open_job, watched
from pipeline.settings import DataSettings
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.steps import StepRun, run_step

SUPERNET_FILE = "supernet.safetensors"
GENOTYPE_FILE = "genotype.json"


@dataclass(frozen=True)
class Found:
    """What a search step found, and the run that has its supernet."""

    run_id: str
    genotype: Genotype
    architecture: Architecture  # in the skeleton of the supernet
    validation_accuracy: float  # of the supernet
    seconds: float
    supernet_id: str  # of the logged model that has it


def search_step(
    job: Job, task: ImageTask, method: Method, config: SearchConfig, seed: int
) -> Found:
    """Search on ``task``, or take over an equal search that is finished or was killed."""
    title = f"search on {task.name}"

    def body(step: StepRun) -> Mapping[str, Any]:
        step.log.log_dataset(task, "source")
        search = BilevelSearch(
            task, method, config, seed=seed, device=job.device, workers=job.machine.workers
        )
        with watched(title, step.log) as observer:
            result = search.run(step.checkpoint, observer)
        return _keep(step, task, method, config, seed, result)

    outcome = run_step(
        "search",
        title,
        {
            "task": task.digest,
            "method": method.name,
            "config": asdict(config),
            "seed": seed,
            "device": job.device.type,
        },
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        params={"source": task.name, "method": method.name, "seed": seed, **flat("search", config)},
        tags={"space": "darts", "method": method.name, "source": task.name},
        say=say,
    )
    results = outcome.results
    return Found(
        run_id=outcome.run_id,
        genotype=Genotype.from_json(results["genotype"]),
        architecture=Architecture.from_json(results["architecture"]),
        validation_accuracy=results["validation_accuracy"],
        seconds=results["seconds"],
        supernet_id=results["supernet_id"],
    )


def _keep(
    step: StepRun,
    task: ImageTask,
    method: Method,
    config: SearchConfig,
    seed: int,
    result: SearchResult,
) -> dict[str, Any]:
    """Write the search's files and pictures; the values are what a later step needs."""
    skeleton = Skeleton("cifar", config.supernet.channels, config.supernet.cells)
    architecture = DartsSpace().from_genotype(result.genotype, skeleton)
    about = {
        "method": method.name,
        "source": task.name,
        "source_digest": task.digest,
        "classes": list(task.classes),
        "seed": seed,
    }
    save_supernet(step.directory / SUPERNET_FILE, result.supernet, about)
    step.log.log_json(result.genotype.to_json(), GENOTYPE_FILE)
    step.log.log_json(architecture.to_json(), ARCHITECTURE_FILE)
    step.log.log_figure(draw_cells(result.genotype), "pictures/cells.png")
    step.log.log_figure(draw_alphas(result.mixing_history, OPERATIONS), "pictures/alphas.png")
    step.log.log_figure(draw_search_curves(result.records), "pictures/curves.png")
    step.log.log_metrics({"search/seconds": result.seconds})
    step.log.set_tags({"genotype.digest": architecture.genotype_digest})
    return {
        "genotype": result.genotype.to_json(),
        "architecture": architecture.to_json(),
        "validation_accuracy": result.records[-1].metrics["val/accuracy"],
        "seconds": result.seconds,
        "supernet_id": step.log.log_output_model("supernet", step.directory / SUPERNET_FILE),
    }


@dataclass(frozen=True)
class SearchSettings:
    """What the entry point ``search`` is asked for."""

    source: DataSettings
    method: Method
    config: SearchConfig
    seed: int


def search(settings: SearchSettings, machine: Machine) -> Found:
    """Search on one data set and say what was found."""
    name = settings.source.name
    with open_job(
        f"search {name}",
        machine,
        {"source": name, "method": settings.method.name, "seed": settings.seed},
        {"space": "darts", "method": settings.method.name, "source": name},
    ) as job:
        task = job.load(settings.source)
        found = search_step(job, task, settings.method, settings.config, settings.seed)
        job.log.log_dataset(task, "source")
        job.log.log_json(found.genotype.to_json(), GENOTYPE_FILE)
        job.log.log_json(found.architecture.to_json(), ARCHITECTURE_FILE)
        job.log.log_figure(draw_cells(found.genotype), "pictures/cells.png")
        job.log.log_metrics(
            {"search/seconds": found.seconds, "search/val_accuracy": found.validation_accuracy}
        )
        job.log.set_tags({"lineage.search_run": found.run_id})
        say(f"found in {human_seconds(found.seconds)}: {found.genotype.to_json()}")
        say(f"train it: python -m pipeline retrain --architecture run:{job.log.run_id}")
    return found

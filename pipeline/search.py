"""Search an architecture on a source data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas.architecture import Architecture, Skeleton
from nas.data import ImageTask
from nas.errors import NASError, TrackingError
from nas.hardware import pick_device
from nas.ops.backend import NATIVE, Backend, choose
from nas.ops.mixed import OPERATIONS
from nas.ops.recipe import source_digest, source_folder
from nas.search import BilevelSearch, Method, SearchConfig, SearchResult
from nas.spaces import DartsSpace
from nas.spaces.darts import Genotype
from nas.trained import save_supernet
from pipeline.console import human_seconds, say
from pipeline.figures import draw_alphas, draw_cells, draw_search_curves
from pipeline.job import Job, Machine, flat, open_job, watched
from pipeline.networks import network_parameters, size_of
from pipeline.settings import DataSettings
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.steps import StepOutcome, StepRun, read_outcome, run_step
from pipeline.tracking import RunLog, Tracker

SUPERNET_FILE = "supernet.safetensors"
GENOTYPE_FILE = "genotype.json"
PICTURES = "pictures"
ALPHAS = f"{PICTURES}/alphas.png"


@dataclass(frozen=True)
class Found:
    """What a search step found, and the run that has its supernet.

    Attributes:
        directory: artifacts of the run, to be read only.
        method, source, source_digest: who searched on what.
        architecture: in the skeleton of the supernet.
        validation_accuracy: of the supernet.
        supernet_id: of the logged model that has it.
    """

    run_id: str
    directory: Path
    method: str
    source: str
    source_digest: str
    genotype: Genotype
    architecture: Architecture
    validation_accuracy: float
    seconds: float
    supernet_id: str

    def metrics(self) -> dict[str, float]:
        """What every job that this search serves logs of it."""
        return {
            "cost/search_seconds": self.seconds,
            "supernet/val_accuracy": self.validation_accuracy,
        }


def pick_backend(machine: Machine) -> Backend:
    """Choose who computes a search, and say so in one line; the first time, this may compile.

    Raises:
        ConfigurationError: the device is not there, or native kernels are wanted and not to be had.
        UnknownNameError: there is no such backend.
    """
    backend = choose(machine.backend, pick_device(machine.device), say)
    reason = backend.reason
    if backend.name == NATIVE:  # python -m nas.ops.build tells the rest
        reason = ", ".join(reason.split(", ")[:2])  # the instruction set and the compiler
    say(f"kernels: {backend.name} ({reason})")
    return backend


def search_step(
    job: Job, task: ImageTask, method: Method, config: SearchConfig, seed: int, backend: Backend
) -> Found:
    """Search on ``task``, or take over an equal search that is finished or was killed."""
    title = f"search on {task.name}"

    def body(step: StepRun) -> Mapping[str, Any]:
        step.log.log_dataset(task, "source")
        search = BilevelSearch(
            task,
            method,
            config,
            seed=seed,
            device=job.device,
            workers=job.machine.workers,
            backend=backend.name,
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
            **_kernels(backend),
        },
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        params={"source": task.name, "method": method.name, "seed": seed, **flat("search", config)},
        tags={
            "space": "darts",
            "method": method.name,
            "source": task.name,
            "backend": backend.name,
        },
        say=say,
    )
    return _found(outcome)


def _kernels(backend: Backend) -> dict[str, str]:
    """Inputs of the step: the backends differ in rounding, and the code of one is no Python."""
    if backend.name == NATIVE:
        return {"backend": NATIVE, "kernels": source_digest(source_folder())}
    return {"backend": backend.name}


def _found(outcome: StepOutcome) -> Found:
    results = outcome.results
    return Found(
        run_id=outcome.run_id,
        directory=outcome.directory,
        method=results["method"],
        source=results["source"],
        source_digest=results["source_digest"],
        genotype=Genotype.from_json(results["genotype"]),
        architecture=Architecture.from_json(results["architecture"]),
        validation_accuracy=results["validation_accuracy"],
        seconds=results["seconds"],
        supernet_id=results["supernet_id"],
    )


def past_search(tracker: Tracker, run_id: str) -> Found:
    """The search that the cells of the run ``run_id`` come from: a search step or any job.

    Raises:
        TrackingError: the run names no search, or the store lacks what that search left.
    """
    run = tracker.run(run_id)
    tags = run.tags if run else {}
    search_id = run_id if tags.get("step") == "search" else tags.get("lineage.search_run")
    if search_id is None:
        raise TrackingError("the run names no search that its cells come from")
    search = tracker.run(search_id)
    outcome = read_outcome(tracker, search) if search else None
    if outcome is None:
        raise TrackingError(f"this store has no complete run {search_id}, which searched for them")
    try:
        return _found(outcome)
    except (KeyError, NASError) as error:
        what = f"the run {search_id}, which searched for them, lacks what is kept today"
        raise TrackingError(f"{what} ({error})") from error


def take_in(job: Job, found: Found) -> None:
    """Make the search an input of the job, so that one can walk back from what it registers."""
    job.log.set_tags(
        {
            "source": found.source,
            "method": found.method,
            "lineage.search_run": found.run_id,
            "lineage.supernet": f"runs:/{found.run_id}/{SUPERNET_FILE}",
            "lineage.genotype": f"runs:/{found.run_id}/{GENOTYPE_FILE}",
            "lineage.source_digest": found.source_digest,
        }
    )
    job.log.log_model_input(found.supernet_id)


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
    origin = {"method": method.name, "source": task.name, "source_digest": task.digest}
    scale = {"mean": list(task.mean), "std": list(task.std)}
    about = {**origin, "classes": list(task.classes), "seed": seed, **scale}
    save_supernet(step.directory / SUPERNET_FILE, result.supernet, about)
    step.log.log_json(result.genotype.to_json(), GENOTYPE_FILE)
    step.log.log_json(architecture.to_json(), ARCHITECTURE_FILE)
    step.log.log_figure(draw_cells(result.genotype), f"{PICTURES}/cells.png")
    step.log.log_figure(draw_alphas(result.mixing_history, OPERATIONS), ALPHAS)
    step.log.log_figure(draw_search_curves(result.records), f"{PICTURES}/curves.png")
    step.log.log_metrics({"cost/search_seconds": result.seconds})
    _log_network(step.log, task, architecture)
    return {
        **origin,
        "genotype": result.genotype.to_json(),
        "architecture": architecture.to_json(),
        "validation_accuracy": result.records[-1].metrics["supernet/val_accuracy"],
        "seconds": result.seconds,
        "supernet_id": step.log.log_output_model("supernet", step.directory / SUPERNET_FILE),
    }


def _log_network(log: RunLog, task: ImageTask, architecture: Architecture) -> None:
    """The discrete network that was found, in the skeleton of the supernet."""
    log.log_params(network_parameters(architecture))
    log.log_metrics(asdict(size_of(architecture, task.shape)))
    log.set_tags({"genotype.digest": architecture.genotype_digest})


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
    backend = pick_backend(machine)
    with open_job(
        f"search {name}",
        machine,
        {
            "source": name,
            "method": settings.method.name,
            "seed": settings.seed,
            **flat("search", settings.config),
        },
        {"space": "darts", "method": settings.method.name, "source": name},
    ) as job:
        task = job.load(settings.source)
        found = search_step(job, task, settings.method, settings.config, settings.seed, backend)
        job.log.log_dataset(task, "source")
        job.log.log_json(found.genotype.to_json(), GENOTYPE_FILE)
        job.log.log_json(found.architecture.to_json(), ARCHITECTURE_FILE)
        job.log.log_artifact(found.directory / PICTURES, PICTURES)
        job.log.log_metrics(found.metrics())
        _log_network(job.log, task, found.architecture)
        take_in(job, found)
        say(f"found in {human_seconds(found.seconds)}: {found.genotype.to_json()}")
        say(f"train it: python -m pipeline retrain --architecture run:{job.log.run_id}")
    return found

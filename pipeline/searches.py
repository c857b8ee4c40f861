"""The step that searches, what it leaves, and the way back to it from a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas.architecture import Architecture, Skeleton
from nas.data import ImageTask, TaskShape
from nas.errors import NASError, TrackingError, UnknownNameError
from nas.hardware import pick_device
from nas.ops.backend import NATIVE, STORAGES, Backend, choose
from nas.ops.mixed import OPERATIONS
from nas.ops.recipe import source_digest, source_folder
from nas.search import BilevelSearch, Method, SearchConfig, SearchResult
from nas.search.replay import CUDA_GRAPHS, OFF
from nas.search.sources import SQUARE_ROOT
from nas.spaces import DartsSpace
from nas.spaces.darts import Genotype
from nas.transfer.zoo import (
    Card,
    SourceCard,
    ZooEntry,
    image_hashes,
    joint_hashes,
    save_entry,
)
from pipeline.console import say
from pipeline.figures import draw_alphas, draw_cells, draw_search_curves
from pipeline.job import Job, Machine, flat, watched
from pipeline.networks import network_parameters, size_of
from pipeline.specification import ARCHITECTURE_FILE
from pipeline.steps import StepOutcome, StepRun, read_outcome, run_step
from pipeline.tracking import RunLog, Tracker
from pipeline.zoo import SUPERNET_FILE, Beginning

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
        epochs: that ran.
        stopped: why no more did; empty where all of them ran.
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
    epochs: int
    stopped: str
    supernet_id: str

    @property
    def supernet_path(self) -> Path:
        """The file of its supernet, an entry of the zoo."""
        return self.directory / SUPERNET_FILE

    def metrics(self) -> dict[str, float]:
        """What every job that this search serves logs of it."""
        return {
            "cost/search_seconds": self.seconds,
            "cost/search_epochs": self.epochs,
            "supernet/val_accuracy": self.validation_accuracy,
        }


def pick_backend(machine: Machine) -> Backend:
    """Choose who computes a search, and say so in one line; the first time, this may compile.

    Raises:
        ConfigurationError: the device is not there, or native kernels are wanted and not to be had.
        UnknownNameError: there is no such backend, storage or choice of CUDA graphs.
    """
    if machine.storage not in STORAGES:
        raise UnknownNameError("storage", machine.storage, STORAGES)
    if machine.cuda_graphs not in CUDA_GRAPHS:
        raise UnknownNameError("choice of CUDA graphs", machine.cuda_graphs, CUDA_GRAPHS)
    backend = choose(machine.backend, pick_device(machine.device), say)
    reason = backend.reason
    if backend.name == NATIVE:  # python -m nas.ops.build tells the rest
        reason = ", ".join(reason.split(", ")[:2])  # the instruction set and the compiler
    say(f"kernels: {backend.name} ({reason})")
    return backend


def search_step(
    job: Job,
    tasks: Sequence[ImageTask],
    method: Method,
    config: SearchConfig,
    seed: int,
    backend: Backend,
    *,
    start: Beginning | None = None,
    sampling: str = SQUARE_ROOT,
) -> Found:
    """Search on ``tasks``, or take over an equal search that is finished or was killed.

    Args:
        tasks: one data set, or several for one supernet.
        start: the supernet to begin with, and how.
        sampling: of several data sets.
    """
    names = "+".join(task.name for task in tasks)
    title = f"search on {names}" + (f", from {start.title}" if start else "")

    def body(step: StepRun) -> Mapping[str, Any]:
        for task in tasks:
            step.log.log_dataset(task, "source")
        search = BilevelSearch(
            tasks,
            method,
            config,
            seed=seed,
            device=job.device,
            workers=job.machine.workers,
            backend=backend.name,
            storage=job.machine.storage,
            start=start.warm_start() if start else None,
            sampling=sampling,
            cuda_graphs=job.machine.cuda_graphs,
        )
        step.log.set_tags({"cuda_graphs": "on" if search.graphs.used else "off"})
        say_choices(search, job.machine)
        with watched(title, step.log) as observer:
            result = search.run(step.checkpoint, observer)
        return _keep(step, tasks, method, seed, result, start)

    outcome = run_step(
        "search",
        title,
        {
            "tasks": [task.digest for task in tasks],
            "sampling": sampling if len(tasks) > 1 else None,
            "method": method.name,
            "config": asdict(config),
            "seed": seed,
            "start": start.warm_start().identity() if start else None,
            "device": job.device.type,
            "storage": job.machine.storage,
            **_kernels(backend),
        },
        body,
        parent=job.log,
        fresh=job.machine.fresh,
        params={
            "source": names,
            "method": method.name,
            "seed": seed,
            **({"sampling": sampling} if len(tasks) > 1 else {}),
            **flat("search", config),
            **(start.parameters() if start else {}),
        },
        tags={
            "space": "darts",
            "method": method.name,
            "source": names,
            "backend": backend.name,
            "storage": job.machine.storage,
            **(start.lineage() if start else {}),
        },
        say=say,
    )
    found = _found(outcome)
    if found.stopped:
        epochs = config.epochs * len(config.stages)
        say(f"{title} ended after {found.epochs} of {epochs} epochs: {found.stopped}")
    return found


def say_choices(search: BilevelSearch, machine: Machine) -> None:
    """Say what ``search`` made of its device, where there was anything to choose."""
    if search.device.type != "cpu":
        for source in search.sources.each:
            say(f"images of {source.name}: {source.train.place}")
    if machine.cuda_graphs != OFF:
        graphs = search.graphs
        say(f"CUDA graphs: {'on' if graphs.used else 'off'} ({graphs.reason})")


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
        epochs=results["epochs"],
        stopped=results["stopped"],
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
    tasks: Sequence[ImageTask],
    method: Method,
    seed: int,
    result: SearchResult,
    start: Beginning | None,
) -> dict[str, Any]:
    """Write the search's files and pictures; the values are what a later step needs."""
    supernet = result.supernet.config  # of the last stage
    skeleton = Skeleton("cifar", supernet.channels, supernet.cells)
    architecture = DartsSpace().from_genotype(result.genotype, skeleton)
    accuracies = tuple(record.metrics["supernet/val_accuracy"] for record in result.records)
    card = Card(
        method.name, seed, tuple(SourceCard.of(task) for task in tasks), accuracies, result.seconds
    )
    hashes = image_hashes(*tasks)
    if start is not None:  # what it learnt from those images moved on with it
        hashes = joint_hashes(hashes, start.entry.hashes)
    entry = ZooEntry(result.supernet, card, hashes)
    save_entry(step.directory / SUPERNET_FILE, entry)
    step.log.log_json(result.genotype.to_json(), GENOTYPE_FILE)
    step.log.log_json(architecture.to_json(), ARCHITECTURE_FILE)
    step.log.log_figure(draw_cells(result.genotype), f"{PICTURES}/cells.png")
    step.log.log_figure(draw_alphas(result.mixing_history, OPERATIONS), ALPHAS)
    step.log.log_figure(draw_search_curves(result.records), f"{PICTURES}/curves.png")
    epochs, stopped = len(result.records), result.stopped
    step.log.log_metrics({"cost/search_seconds": result.seconds, "cost/search_epochs": epochs})
    if stopped is not None:
        step.log.set_tags({"search.stopped": f"{stopped.rule}: {stopped.reason}"})
    log_network(step.log, result.supernet.shape, architecture)
    return {
        "method": method.name,
        "source": "+".join(task.name for task in tasks),
        "source_digest": "+".join(task.digest for task in tasks),
        "genotype": result.genotype.to_json(),
        "architecture": architecture.to_json(),
        "validation_accuracy": accuracies[-1],
        "seconds": result.seconds,
        "epochs": epochs,
        "stopped": stopped.reason if stopped else "",
        "supernet_id": step.log.log_output_model("supernet", step.directory / SUPERNET_FILE),
    }


def log_network(log: RunLog, shape: TaskShape, architecture: Architecture) -> None:
    """The discrete network that was found, in the skeleton of the supernet."""
    log.log_params(network_parameters(architecture))
    log.log_metrics(asdict(size_of(architecture, shape)))
    log.set_tags({"genotype.digest": architecture.genotype_digest})

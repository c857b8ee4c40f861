"""Train networks on the target from scratch: the transferred one over seeds, and random ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas.architecture import Architecture
from nas.data import ImageTask, TaskShape
from nas.evaluation import count_macs, count_parameters
from nas.observer import EpochRecord
from nas.randomness import derive_seed
from nas.spaces import DartsSpace, find_space
from nas.trained import TrainedNetwork, load_network, save_network
from nas.training import TrainConfig, Training
from pipeline.console import say
from pipeline.figures import draw_cells, draw_learning_curves
from pipeline.job import Job, flat, watched
from pipeline.steps import StepRun, run_step, step_digest
from pipeline.tuning import Proposal, is_failure, sampled_search

NETWORK_FILE = "network.safetensors"
TRANSFERRED, RANDOM = "transferred", "random"


@dataclass(frozen=True)
class NetworkSize:
    """Trainable parameters, and multiply-adds for one image; the fields are the metrics' names."""

    params: int
    macs: int


def size_of(architecture: Architecture, shape: TaskShape) -> NetworkSize:
    """How large the network of ``architecture`` is for images of ``shape``."""
    network = find_space(architecture.space).meta_network(architecture, shape, auxiliary=False)
    return NetworkSize(count_parameters(network), count_macs(network, shape))


def network_parameters(architecture: Architecture) -> dict[str, Any]:
    """What a run logs of the network that it found or trains: ``network.*``."""
    skeleton = flat("network", asdict(architecture.skeleton))
    return {**skeleton, "network.digest": architecture.digest}


@dataclass(frozen=True, eq=False)
class Trained:
    """One trained network: the run that has it, and how it did on the validation split."""

    label: str  # "transferred, seed 0"
    group: str  # TRANSFERRED or RANDOM
    run_id: str
    digest: str  # of architecture, data, recipe and seed
    architecture: Architecture
    validation_accuracy: float
    seconds: float
    parameters: int
    macs: int
    records: tuple[EpochRecord, ...]
    path: Path

    def load(self) -> TrainedNetwork:
        """The network itself."""
        return load_network(self.path)


@dataclass(frozen=True)
class Candidate:
    """A network to train: what, by which recipe, from which seed, and what to call it."""

    label: str
    group: str
    architecture: Architecture
    config: TrainConfig
    seed: int


def train_step(job: Job, task: ImageTask, candidate: Candidate) -> Trained:
    """Train ``candidate`` on ``task``, or take over an equal training."""
    architecture, config = candidate.architecture, candidate.config
    inputs = {
        "task": task.digest,
        "architecture": architecture.to_json(),
        "config": asdict(config),
        "seed": candidate.seed,
        "device": job.device.type,
    }
    outcome = run_step(
        "train",
        f"train {candidate.label} on {task.name}",
        inputs,
        lambda step: _train(job, task, candidate, step),
        parent=job.log,
        fresh=job.machine.fresh,
        params={
            "target": task.name,
            **network_parameters(architecture),
            "seed": candidate.seed,
            **flat("train", config),
        },
        tags={
            "space": architecture.space,
            "target": task.name,
            "group": candidate.group,
            "genotype.digest": architecture.genotype_digest,
        },
        say=say,
    )
    results = outcome.results
    return Trained(
        label=candidate.label,
        group=candidate.group,
        run_id=outcome.run_id,
        digest=step_digest("train", inputs),
        architecture=architecture,
        validation_accuracy=results["validation_accuracy"],
        seconds=results["seconds"],
        parameters=results["params"],
        macs=results["macs"],
        records=tuple(EpochRecord(e, m) for e, m in enumerate(results["records"])),
        path=outcome.directory / NETWORK_FILE,
    )


def _train(job: Job, task: ImageTask, candidate: Candidate, step: StepRun) -> dict[str, Any]:
    """The work of the step; the values are what a later step needs."""
    architecture = candidate.architecture
    step.log.log_dataset(task, "target")
    training = Training(
        task,
        architecture,
        candidate.config,
        seed=candidate.seed,
        device=job.device,
        workers=job.machine.workers,
    )
    title = f"train {candidate.label} on {task.name}"
    with watched(title, step.log, job.team.observer) as observer:
        result = training.run(step.checkpoint, observer)
    trained = TrainedNetwork(result.network, architecture, task.shape)
    save_network(step.directory / NETWORK_FILE, trained)
    if architecture.space == "darts":
        cells = draw_cells(DartsSpace().genotype(architecture))
        step.log.log_figure(cells, "pictures/cells.png")
    curves = draw_learning_curves({candidate.label: result.records})
    step.log.log_figure(curves, "pictures/curves.png")
    size = asdict(size_of(architecture, task.shape))
    step.log.log_metrics({**size, "cost/training_seconds": result.seconds})
    return {
        **size,
        "validation_accuracy": result.validation_accuracy,
        "seconds": result.seconds,
        "records": [dict(record.metrics) for record in result.records],
    }


def train_beside_random(
    job: Job,
    task: ImageTask,
    architecture: Architecture,
    config: TrainConfig,
    seeds: Sequence[int],
) -> tuple[list[Trained], list[Trained]]:
    """``architecture`` once from each seed, and as many random ones: the honest baseline.

    The random architectures are of the same space and skeleton and are trained by the same
    recipe. One that cannot be trained is noted with its reason and another takes its place.

    Raises:
        NASError: too many of them could not be trained.
    """

    def train_seed(seed: int) -> Trained:
        label = f"transferred, seed {seed}"
        return train_step(job, task, Candidate(label, TRANSFERRED, architecture, config, seed))

    random: dict[int, Trained] = {}

    def train_proposal(proposal: Proposal) -> float | Exception:
        number = proposal.number
        try:
            seed = derive_seed(seeds[0], "random baseline", number) % 2**31
            candidate = Candidate(f"random {number}", RANDOM, proposal.architecture, config, seed)
            random[number] = train_step(job, task, candidate)
        except Exception as error:
            if is_failure(error):
                return error.with_traceback(None)  # whose frames would keep the network in memory
            raise
        return random[number].validation_accuracy

    transferred = job.team.start(train_seed, seeds)
    outcomes = sampled_search(
        "random",
        find_space(architecture.space),
        architecture.skeleton,
        lambda proposals: job.team.map(train_proposal, proposals),
        wanted=len(seeds),
        together=len(seeds),  # random proposals need not wait for one another's scores
        seed=seeds[0],
    )
    failed = {str(o.number): o.reason for o in outcomes if o.reason is not None}
    if failed:
        networks = "network" if len(failed) == 1 else "networks"
        reasons = "; ".join(failed.values())
        say(f"{len(failed)} random {networks} could not be trained: {reasons}")
        job.log.set_tags({"random.failed": json.dumps(failed)})
    scored = [random[o.number] for o in outcomes if o.score is not None]
    return job.team.finish(transferred), scored

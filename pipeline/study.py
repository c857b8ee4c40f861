"""Studies: experiments of many searches, each a row of a CSV file and a run of the tracking store.

A study that was killed goes on where it was: its file says which cells are done. The report is
written from the file alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nas.errors import UnknownNameError
from nas.search import find_method
from nas.study.analysis import COLUMNS, STUDY, Row
from nas.study.domains import EVEN, FAMILIES, INVERTED, ODD, TURNED, Domain
from nas.study.warm_start import Cell, Laboratory, Outcome, WarmStartStudy
from nas.training import TRAINING_PRESETS
from pipeline.console import counting, say
from pipeline.job import Job, Machine, RunObserver, open_job, ui_command
from pipeline.presets import PRESETS
from pipeline.process import describe_device
from pipeline.rows import Rows
from pipeline.searches import pick_backend
from pipeline.steps import home, locked
from pipeline.study_report import write_report

CONTROLS = (Domain("mnist-test", ODD, INVERTED), Domain("cifar10-test", ODD, TURNED))


@dataclass(frozen=True)
class StudySettings:
    """What the entry point ``study`` is asked for.

    Attributes:
        results: the CSV file; the report and its pictures lie beside it.
        at_most: cells to run this time; None is all that are left, 0 writes the report alone.
    """

    preset: str
    results: Path
    seeds: int
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in STUDIES:
            raise UnknownNameError("study", self.preset, STUDIES)


@dataclass(frozen=True)
class Study:
    """One row of the table of studies: a summary for people, and the story it runs."""

    summary: str
    run: Callable[[StudySettings, Machine], None]


def study(settings: StudySettings, machine: Machine) -> None:
    """Run the cells that are missing, and write the report."""
    STUDIES[settings.preset].run(settings, machine)


def warm_start_preset(seeds: int) -> WarmStartStudy:
    """Some 10 seconds of a processor a search from scratch by PC-DARTS, 30 by DARTS.

    12 epochs, so that three seeds of both methods take hours and not days; warm searches of up to
    half as many, 3 being the quarter that the claim of a fourfold speed-up needs. Sources are
    larger than targets and searched for longer, as they are in earnest: 7 times the steps of a
    search from scratch. Chosen on a seed that the study does not use; docs/studies says how.
    """
    searches = []
    for name in ("pcdarts", "darts"):
        method = find_method(name)
        config = PRESETS["quick"].search(method)
        waiting = round(12 * config.warmup_epochs / config.epochs)
        searches.append((name, replace(config, epochs=12, warmup_epochs=waiting, batch_size=32)))
    return WarmStartStudy(
        targets=tuple(Domain(family, EVEN) for family in FAMILIES),
        sources=(*(Domain(family, ODD) for family in FAMILIES), *CONTROLS),
        searches=tuple(searches),
        seeds=seeds,
        budgets=(1, 2, 3, 6),
        reduced_epochs=3,
        limit=1500,
        source_limit=4000,
        source_epochs=20,
        multi_epochs=8,
        side=12,
        training=replace(TRAINING_PRESETS["quick"], epochs=8),
    )


def warm_start_study(settings: StudySettings, machine: Machine) -> None:
    """Searches from scratch beside searches that begin with another set's supernet."""
    run_warm_start(warm_start_preset(settings.seeds), settings, machine)


def run_warm_start(design: WarmStartStudy, settings: StudySettings, machine: Machine) -> None:
    """Run what is missing of ``design`` and write the report."""
    tags = {"space": "darts", "study": design.digest}
    with (
        open_job(f"study {settings.preset}", machine, {}, tags) as job,
        locked(_lock_of(settings.results), "the study"),
    ):
        rows = Rows(settings.results, COLUMNS, (STUDY, design.digest))
        _run_missing(job, design, settings, rows)
        known = [Row.read(row) for row in rows.rows]
        report = write_report(known, design, settings.results.parent)
        job.log.log_artifact(settings.results)
        for path in report:
            job.log.log_artifact(path)
        say(f"report: {report[0]}")
        say(f"open the MLflow UI: {ui_command(job.log.tracker)}")


def _lock_of(results: Path) -> Path:
    """Held by the process that writes ``results``; not beside it, where it would be published."""
    folder = home() / "studies"
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:16]
    return folder / f"{name}.lock"


def _run_missing(job: Job, design: WarmStartStudy, settings: StudySettings, rows: Rows) -> None:
    done = {Row.read(row).key for row in rows.rows}
    cells = design.cells()
    missing = [cell for cell in cells if key_of(cell) not in done][: settings.at_most]
    say(f"{len(cells)} cells, {len(done)} of them done, {len(missing)} to run")
    if not missing:
        return
    backend = pick_backend(job.machine)  # not for a report alone: this may compile
    laboratory = Laboratory(
        design,
        job.machine.data or home() / "data",
        home() / "studies",
        device=job.device,
        backend=backend.name,
    )
    with counting(f"study {settings.preset}") as progress:
        for number, cell in enumerate(missing):
            progress("cells", number, len(missing))
            outcome = _run_cell(job, laboratory, cell)
            row = Row.of(design, cell, outcome, f"{backend.name}, {describe_device()}")
            rows.append(row.write())
            say(f"{number + 1}/{len(missing)} {cell.title}: {row.summary}")


def key_of(cell: Cell) -> tuple[str, ...]:
    """What names a cell in the file."""
    return cell.target.name, cell.method, str(cell.seed), cell.start, str(cell.epochs)


def _run_cell(job: Job, laboratory: Laboratory, cell: Cell) -> Outcome:
    tags = {
        "space": "darts",
        "step": "cell",
        "method": cell.method,
        "target": cell.target.name,
        "study.start": cell.start,
        "study.epochs": str(cell.epochs),
    }
    with job.log.tracker.open_run(cell.title, parent=job.log, tags=tags) as log:
        log.log_params({"target": cell.target.name, "method": cell.method, "seed": cell.seed})
        log.log_dataset(laboratory.targets[cell.target].task, "target")
        outcome = laboratory.run(cell, RunObserver(log))
        log.set_tags({"source": "+".join(outcome.sources) or "scratch"})
        log.log_metrics(_metrics(outcome))
        log.log_json(outcome.genotype.to_json(), "genotype.json")
    return outcome


def _metrics(outcome: Outcome) -> Mapping[str, float]:
    """What is known, by the names that runs share."""
    metrics = {
        "cost/search_seconds": sum(outcome.seconds),
        "cost/processor_seconds": outcome.processor_seconds,
        "cost/search_epochs": float(len(outcome.seconds)),
        "warm/distance": outcome.distance,
        "test/accuracy": outcome.test_accuracy,
        "cost/training_seconds": outcome.train_seconds,
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


STUDIES: dict[str, Study] = {
    "warm-start": Study(
        "searches that begin with the supernet of the nearest, a random or the farthest source, or "
        "of all together, beside searches from scratch",
        warm_start_study,
    ),
}

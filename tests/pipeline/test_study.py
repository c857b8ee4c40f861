"""A tiny study: it goes on where it was killed, runs no cell twice, and reports from its file."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from workplace import Workplace

from nas.errors import ConfigurationError, DataError, UnknownNameError
from nas.observer import Observer
from nas.study.domains import EVEN, ODD, Domain
from nas.study.warm_start import STARTS, Cell, Laboratory, Outcome, WarmStartStudy
from pipeline.cli import main
from pipeline.job import Machine
from pipeline.rows import Rows
from pipeline.study import StudySettings, run_warm_start, warm_start_preset

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("cpu", backend="eager")


def tiny(seeds: int = 1) -> WarmStartStudy:
    """One target, three sources, two epochs, one method."""
    full = warm_start_preset(seeds)
    name, config = full.searches[0]
    small = replace(config.supernet, channels=2, cells=3)
    config = replace(config, supernet=small, epochs=2, warmup_epochs=1, batch_size=16)
    return replace(
        full,
        targets=(Domain("digits", EVEN),),
        sources=tuple(Domain(family, ODD) for family in ("digits", "mnist5k", "animals")),
        searches=((name, config),),
        budgets=(1,),
        reduced_epochs=1,
        limit=120,
        source_limit=150,
        source_epochs=1,
        multi_epochs=1,
        side=8,
        training=replace(full.training, epochs=1, batch_size=16),
    )


class TestDesign:
    def test_every_prefix_of_whole_rounds_is_balanced(self) -> None:
        design = warm_start_preset(seeds=3)
        cells, targets = design.cells(), len(design.targets)
        rounds = 2 + 4 * len(design.budgets) + 1  # scratch twice, four starts, nearest at full
        assert len(cells) == len(set(cells)) == 3 * 2 * rounds * targets
        for first in range(0, len(cells), targets):
            part = cells[first : first + targets]
            assert {cell.target for cell in part} == set(design.targets)
            assert len({(c.method, c.seed, c.start, c.epochs) for c in part}) == 1
        assert {cell.start for cell in cells[: rounds * targets]} == set(STARTS)
        assert {(cell.method, cell.seed) for cell in cells[: rounds * targets]} == {("pcdarts", 0)}

    def test_a_fourfold_speed_up_is_among_the_budgets(self) -> None:
        design = warm_start_preset(seeds=1)
        assert design.full_epochs / design.reduced_epochs == 4
        trained = {(c.start, c.epochs) for c in design.cells() if design.is_trained(c)}
        assert trained == {
            ("scratch", 12),
            ("scratch", 3),
            ("nearest", 12),
            ("nearest", 3),
            ("multi", 3),
        }

    @pytest.mark.parametrize("budgets", [(2, 1), (1, 1), (3,), ()])
    def test_budgets(self, budgets: tuple[int, ...]) -> None:
        with pytest.raises(ConfigurationError, match="the budgets of its warm ones rise"):
            replace(tiny(), budgets=budgets)

    def test_a_warm_search_is_shorter(self) -> None:
        with pytest.raises(ConfigurationError, match="2 epochs is not shorter than one from scra"):
            replace(tiny(), budgets=(1, 2))

    def test_targets_and_sources_share_no_class(self) -> None:
        design = warm_start_preset(seeds=1)
        assert {target.half for target in design.targets} == {EVEN}
        assert {source.half for source in design.sources} == {ODD}
        assert min(len(design.targets), len(design.sources)) >= 6

    def test_more_seeds_are_the_same_study_and_other_settings_are_not(self) -> None:
        assert tiny(1).digest == tiny(2).digest
        assert tiny().digest != replace(tiny(), side=9).digest

    def test_a_target_is_no_source(self) -> None:
        with pytest.raises(ConfigurationError, match="which are other sets"):
            replace(tiny(), targets=tiny().sources[:1])

    def test_unknown_studies(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'warm-start'"):
            StudySettings("warm-star", tmp_path / "x.csv", 1)
        assert main(["study", "--preset", "nonsense"]) == 1


class TestRun:
    def test_a_killed_study_goes_on_and_runs_no_cell_twice(
        self,
        workplace: Workplace,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        ran: list[Cell] = []
        really = Laboratory.run

        def dies_in_the_third(
            laboratory: Laboratory, cell: Cell, observer: Observer | None = None
        ) -> Outcome:
            if len(ran) == 2:
                raise KeyboardInterrupt
            ran.append(cell)
            return really(laboratory, cell, observer)

        def counts(laboratory: Laboratory, cell: Cell, observer: Observer | None = None) -> Outcome:
            ran.append(cell)
            return really(laboratory, cell, observer)

        results = workplace.folder / "out" / "results.csv"
        settings = StudySettings("warm-start", results, 1)
        monkeypatch.setattr(Laboratory, "run", dies_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_warm_start(tiny(), settings, MACHINE)
        before = results.read_text()
        assert len(list(csv.DictReader(before.splitlines()))) == 2

        monkeypatch.setattr(Laboratory, "run", counts)
        run_warm_start(tiny(), settings, MACHINE)
        text = results.read_text()
        assert text.startswith(before)
        assert ran == tiny().cells()
        assert "7 cells, 2 of them done, 5 to run" in capsys.readouterr().out
        self.check_rows(list(csv.DictReader(text.splitlines())))
        report = results.with_name("report.md").read_text()
        assert "7 of 7 rows" in report
        for picture in re.findall(r"\]\((.*)\)", report):
            assert results.with_name(picture).stat().st_size > 1000

        run_warm_start(tiny(), settings, MACHINE)
        assert len(ran) == 7
        assert results.read_text() == text
        with pytest.raises(DataError, match="settings have changed since"):
            run_warm_start(replace(tiny(), side=9), settings, MACHINE)
        self.check_runs()

    def check_rows(self, rows: list[dict[str, str]]) -> None:
        by_start = {row["start"]: row for row in rows}
        sources = {start: row["source"] for start, row in by_start.items()}
        assert sources.pop("scratch") == ""
        multi = sources.pop("multi")
        assert multi == "digits-odd+mnist5k-odd+animals-odd"
        assert set(sources.values()) == set(multi.split("+"))
        distances = [float(by_start[s]["distance"]) for s in ("nearest", "random", "farthest")]
        assert distances == sorted(distances)
        for row in rows:
            epochs = int(row["epochs"])
            assert len(row["accuracies"].split()) == len(row["seconds"].split()) == epochs
            assert 0 < float(row["processor_seconds"]) < 60
            trained = row["start"] in ("scratch", "nearest", "multi")
            assert bool(row["test_accuracy"]) == trained
        assert sorted((row["start"], row["epochs"]) for row in rows) == [
            ("farthest", "1"),
            ("multi", "1"),
            ("nearest", "1"),
            ("nearest", "2"),
            ("random", "1"),
            ("scratch", "1"),
            ("scratch", "2"),
        ]

    def check_runs(self) -> None:
        client = MlflowClient()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments)
        cells = [run for run in runs if run.data.tags.get("step") == "cell"]
        done = [run for run in cells if run.info.status == "FINISHED"]
        assert len(done) == 7
        assert all("mlflow.parentRunId" in run.data.tags for run in done)
        curve = client.get_metric_history(done[0].info.run_id, "supernet/val_accuracy")
        assert len(curve) in (1, 2)
        text = (ROOT / "docs" / "tracking.md").read_text()
        documented = set(re.findall(r"`([^`\n]+)`", text))
        names = {
            name
            for run in runs
            for kind in (run.data.params, run.data.tags, run.data.metrics)
            for name in kind
            if not name.startswith("mlflow.")
        }
        assert {n for n in names if not any(fnmatchcase(n, d) for d in documented)} == set()


class TestRows:
    def test_other_columns_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        Rows(path, ("study", "a"), ("study", "s")).append({"study": "s", "a": 'text, "quoted"'})
        assert Rows(path, ("study", "a"), ("study", "s")).rows[0]["a"] == 'text, "quoted"'
        with pytest.raises(DataError, match="name another --results"):
            Rows(path, ("study", "b"), ("study", "s"))
        with pytest.raises(DataError, match="rows of the study s"):
            Rows(path, ("study", "a"), ("study", "t"))

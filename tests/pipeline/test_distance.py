"""Distances of data sets as a user measures them: what the run has, and what is reused."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from workplace import Workplace

from nas.errors import ConfigurationError, TrackingError, UnknownNameError
from nas.transfer.otdd import OTDDConfig
from pipeline import distance as module
from pipeline.cli import main
from pipeline.distance import Distances, DistanceSettings, short_names
from pipeline.settings import DataSettings

ARGUMENTS = ["distance", "--datasets", "digits, mnist5k,animals", "--limit", "300"]


def settings(names: list[str], features: str = "pca") -> DistanceSettings:
    return DistanceSettings(tuple(map(DataSettings, names)), features, OTDDConfig(), 100, 0)


def jobs() -> list[Run]:
    """Runs that are nested in no other, the last first."""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


class TestSettings:
    @pytest.mark.parametrize("names", [[], ["digits"], ["digits", "animals", "digits"]])
    def test_two_different_sets_are_needed(self, names: list[str]) -> None:
        with pytest.raises(ConfigurationError, match="at least two different data sets"):
            settings(names)

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
            settings(["digit", "animals"])
        with pytest.raises(UnknownNameError, match="did you mean 'pixels'"):
            settings(["digits", "animals"], "pixel")

    def test_short_names_are_different(self) -> None:
        names = ["folder:/a/pets", "digits", "folder:/b/pets", "folder:c/pets/"]
        assert short_names(names) == ["pets", "digits", "pets-2", "pets-3"]

    def test_metrics_have_names_that_mlflow_takes(self) -> None:
        distances = Distances(("a:b", "ü"), np.array([[0, 2.5], [2.5, 0]]))
        assert distances.metrics() == {"otdd/a-b/-": 2.5}


class TestRun:
    def test_matrix_pictures_and_reuse(
        self, workplace: Workplace, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(ARGUMENTS) == 0
        output = capsys.readouterr().out
        client = MlflowClient()
        (job,) = jobs()
        metrics = job.data.metrics
        names = ["digits", "mnist5k", "animals"]
        logged = {name for name in metrics if name.startswith("otdd/")}
        assert logged == {"otdd/digits/mnist5k", "otdd/digits/animals", "otdd/mnist5k/animals"}
        table = Path(client.download_artifacts(job.info.run_id, "distances.csv")).read_text()
        rows = list(csv.reader(table.splitlines()))
        assert rows[0] == ["", *names]
        matrix = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
        assert np.array_equal(matrix, matrix.T)
        assert np.diag(matrix).tolist() == [0, 0, 0]
        assert matrix[0, 1] == metrics["otdd/digits/mnist5k"] > 1
        pictures = {entry.path for entry in client.list_artifacts(job.info.run_id, "pictures")}
        assert pictures == {"pictures/distances.png", "pictures/map.png"}
        nearest = names[int(np.where(np.eye(3, dtype=bool), np.inf, matrix).argmin(1)[0])]
        assert f"nearest to digits: {nearest} at" in output

        assert main(ARGUMENTS) == 0
        again = capsys.readouterr().out
        assert re.findall(r"^reusing (.*) \(run", again, re.MULTILINE) == [
            "describe digits",
            "describe mnist5k",
            "describe animals",
            "distance of 3 data sets",
        ]
        assert jobs()[0].data.metrics == metrics

    def test_a_killed_step_goes_on_with_the_pairs_that_it_had(
        self, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[str, str]] = []
        really = module.cached_distance

        def dies_at_the_third(*arguments: Any) -> float:
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append((arguments[0].name, arguments[1].name))
            return really(*arguments)

        monkeypatch.setattr(module, "cached_distance", dies_at_the_third)
        assert main(ARGUMENTS) == 130
        monkeypatch.setattr(module, "cached_distance", really)
        files = set((workplace.folder / "home" / "distances").iterdir())
        assert len(files) == 2
        before = {file: file.stat().st_mtime_ns for file in files}
        assert main(ARGUMENTS) == 0
        assert len(set((workplace.folder / "home" / "distances").iterdir())) == 3
        assert {file: file.stat().st_mtime_ns for file in files} == before

    def test_a_run_that_searched_nothing_has_no_trunk(self, workplace: Workplace) -> None:
        with pytest.raises(TrackingError, match="names no search"):
            main([*ARGUMENTS, "--features", "run:0123456789abcdef", "--verbose"])

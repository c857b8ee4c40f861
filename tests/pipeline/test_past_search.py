"""The search behind a run: found from a search step and from jobs, refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nas.architecture import Skeleton
from nas.data import ImageTask
from nas.errors import TrackingError
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED
from pipeline.inputs import datasets_of
from pipeline.searches import Found, past_search
from pipeline.steps import StepRun, run_step
from pipeline.tracking import RunLog, Tracker

ARCHITECTURE = DartsSpace().from_genotype(PUBLISHED["PDARTS"], Skeleton("cifar", 4, 3))
RESULTS: dict[str, Any] = {
    "method": "pcdarts",
    "source": "digits",
    "source_digest": "ab12",
    "genotype": PUBLISHED["PDARTS"].to_json(),
    "architecture": ARCHITECTURE.to_json(),
    "validation_accuracy": 0.75,
    "seconds": 12.5,
    "epochs": 6,
    "stopped": "for 5 epochs the derived cells have not changed",
    "supernet_id": "m-1",
}


def search_job(tracker: Tracker, results: Mapping[str, Any] = RESULTS) -> tuple[str, str]:
    """A job with a search step that left ``results``: the ids of both."""

    def body(step: StepRun) -> Mapping[str, Any]:
        return results

    with tracker.open_run("search digits") as job:
        outcome = run_step("search", "search on digits", {"seed": 0}, body, parent=job)
        job.set_tags({"lineage.search_run": outcome.run_id})
    return job.run_id, outcome.run_id


def test_of_the_search_itself_and_of_a_job_that_names_it(tracker: Tracker) -> None:
    job_id, step_id = search_job(tracker)
    found = past_search(tracker, step_id)
    assert found == Found(
        run_id=step_id,
        directory=tracker.artifacts(step_id),
        method="pcdarts",
        source="digits",
        source_digest="ab12",
        genotype=PUBLISHED["PDARTS"],
        architecture=ARCHITECTURE,
        validation_accuracy=0.75,
        seconds=12.5,
        epochs=6,
        stopped="for 5 epochs the derived cells have not changed",
        supernet_id="m-1",
    )
    assert past_search(tracker, job_id) == found
    assert found.metrics() == {
        "cost/search_seconds": 12.5,
        "cost/search_epochs": 6,
        "supernet/val_accuracy": 0.75,
    }


class TestRefused:
    def refuse(self, tracker: Tracker, run_id: str, message: str) -> None:
        with pytest.raises(TrackingError, match=message) as caught:
            past_search(tracker, run_id)
        assert "\n" not in str(caught.value)

    def test_a_run_without_a_search(self, tracker: Tracker) -> None:
        with tracker.open_run("retrain DARTS_V2") as job:
            job.set_tags({"lineage.architecture": "DARTS_V2"})
        self.refuse(tracker, job.run_id, "the run names no search")

    def test_a_search_of_another_store(self, tracker: Tracker) -> None:
        with tracker.open_run("search") as job:
            job.set_tags({"lineage.search_run": "0" * 32})
        self.refuse(tracker, job.run_id, "this store has no complete run 00000000")

    def test_a_search_that_is_not_finished(self, tracker: Tracker) -> None:
        with tracker.open_run("search", tags={"step": "search"}) as step:
            pass
        self.refuse(tracker, step.run_id, f"no complete run {step.run_id}")

    @pytest.mark.parametrize("lost", ["seconds", "source", "epochs", "supernet_id"])
    def test_a_search_that_lacks_a_value(self, tracker: Tracker, lost: str) -> None:
        results = {name: value for name, value in RESULTS.items() if name != lost}
        job_id, step_id = search_job(tracker, results)
        self.refuse(tracker, job_id, f"the run {step_id}, .* lacks .* \\('{lost}'\\)")

    def test_a_search_of_cells_that_nobody_knows(self, tracker: Tracker) -> None:
        job_id, _ = search_job(tracker, {**RESULTS, "genotype": {"normal": []}})
        self.refuse(tracker, job_id, "lacks what is kept today \\(")


def test_data_sets_and_files_of_another_run(
    tracker: Tracker, few_digits: ImageTask, tmp_path: Path
) -> None:
    with tracker.open_run("search") as source, tracker.open_run("empty") as empty:
        source.log_dataset(few_digits, "source")
    picture = tmp_path / "alphas.png"
    picture.write_bytes(b"png")

    def take(log: RunLog) -> None:
        log.log_datasets_of(source.run_id)
        log.log_datasets_of(empty.run_id)
        log.log_artifact(picture, "pictures")

    with tracker.open_run("retrain") as job:
        take(job)
        take(job)  # again: nothing is there twice
    (dataset,) = datasets_of(tracker.client.get_run(job.run_id))
    assert (dataset.name, dataset.digest, dataset.context) == (
        few_digits.name,
        few_digits.digest,
        "source",
    )
    assert (tracker.artifacts(job.run_id) / "pictures" / "alphas.png").read_bytes() == b"png"

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from workplace import PROCESSES, Workplace

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.errors import ConfigurationError, NASError, NonFiniteLossError
from pipeline import steps
from pipeline.steps import StepOutcome, StepRun, code_digest, home, run_step, step_digest
from pipeline.tracking import RunLog, Tracker, connect

INPUTS = {"seed": 1, "epochs": 20}


def count(step: StepRun) -> Mapping[str, Any]:
    """A training in miniature: chaotic numbers, a checkpoint an epoch, a file at the end."""
    values, start = torch.full((4,), 0.3, dtype=torch.float64), 0
    if step.checkpoint.exists():
        saved = load_checkpoint(step.checkpoint)
        values, start = saved.tensors["values"], saved.values["epoch"]
    for epoch in range(start, INPUTS["epochs"]):
        values = 3.9 * values * (1 - values) + torch.arange(4) * 1e-4
        time.sleep(0.01)
        save_checkpoint(step.checkpoint, Checkpoint({"values": values}, {"epoch": epoch + 1}))
        step.log.log_metrics({"value": float(values[0])}, step=epoch)
    end = Checkpoint({"values": values}, {"epoch": INPUTS["epochs"]})
    save_checkpoint(step.directory / "weights.safetensors", end)
    return {"sum": float(values.sum()), "epochs": INPUTS["epochs"]}


def job(said: list[str], fresh: bool = False, body: Callable = count) -> StepOutcome:
    with connect().open_run("job") as log:
        return run_step(
            "count", "count to twenty", INPUTS, body, parent=log, fresh=fresh, say=said.append
        )


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever edits the library while the tests run does not make their steps different."""
    monkeypatch.setattr("pipeline.steps.code_digest", lambda: "the code")


def job_in_a_process() -> None:
    steps.code_digest = lambda: "the code"
    job([])


def job_killed_at(place: str) -> None:
    """A job that gets SIGKILL when its step comes to ``place``."""
    end = Tracker._end

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def end_and_die(tracker: Tracker, run_id: str, status: str) -> None:
        end(tracker, run_id, status)
        die()

    if place == "before the artifacts":
        RunLog.log_artifact = die
    elif place == "before the status":
        Tracker._end = die
    elif place == "after the status":
        Tracker._end = end_and_die
    job_in_a_process()


def weights(outcome: StepOutcome) -> torch.Tensor:
    return load_checkpoint(outcome.directory / "weights.safetensors").tensors["values"]


def never(_: StepRun) -> Mapping[str, Any]:
    raise AssertionError("the step was run again")


def interrupt_at(epoch: int, error: BaseException) -> Callable[[StepRun], Mapping[str, Any]]:
    def body(step: StepRun) -> Mapping[str, Any]:
        save_checkpoint(step.checkpoint, Checkpoint({}, {"epoch": epoch}))
        (step.directory / "half.txt").write_text("half")
        raise error

    return body


def runs(tracker: Tracker) -> list[tuple[str, str]]:
    """(run id, status) of every run of the step, the last one first."""
    found = tracker.client.search_runs([tracker.experiment_id], "tags.step = 'count'")
    return [(run.info.run_id, run.info.status) for run in found]


def checkpoint_time(place: Workplace) -> int:
    """When the step's checkpoint was last written, 0 for never."""
    found = place.folder.glob("home/steps/*/checkpoint.safetensors")
    return max((path.stat().st_mtime_ns for path in found), default=0)


def work_folders(place: Workplace) -> list[Path]:
    return [path for path in (place.folder / "home" / "steps").iterdir() if path.is_dir()]


class TestFinished:
    def test_a_step_leaves_results_files_and_no_work_folder(
        self, tracker: Tracker, workplace: Workplace
    ) -> None:
        outcome = job([])
        assert not outcome.reused
        assert outcome.results["epochs"] == 20
        stored = tracker.artifacts(outcome.run_id)
        assert json.loads((stored / "results.json").read_text()) == outcome.results
        assert float(weights(outcome).sum()) == outcome.results["sum"]
        assert work_folders(workplace) == []
        assert runs(tracker) == [(outcome.run_id, "FINISHED")]

    def test_an_equal_step_is_reused_and_the_parent_says_so(self, tracker: Tracker) -> None:
        first = job([])
        said: list[str] = []
        with tracker.open_run("another job") as parent:
            for _ in range(2):
                again = run_step(
                    "count", "count to twenty", INPUTS, never, parent=parent, say=said.append
                )
        assert again.reused
        assert (again.run_id, again.results) == (first.run_id, first.results)
        assert load_checkpoint(again.directory / "weights.safetensors").values["epoch"] == 20
        assert parent.tags()["reused.count"] == first.run_id
        assert said[0].startswith(f"reusing count to twenty (run {first.run_id[:8]}, finished 20")

    def test_fresh_runs_it_again(self, tracker: Tracker) -> None:
        first = job([])
        second = job([], fresh=True)
        assert not second.reused
        assert second.run_id != first.run_id
        assert second.results == first.results

    def test_other_inputs_are_another_step(self, tracker: Tracker) -> None:
        first = job([])
        with tracker.open_run("job") as parent:
            other = run_step("count", "c", {**INPUTS, "seed": 2}, count, parent=parent)
        assert other.run_id != first.run_id

    @pytest.mark.parametrize("lost", ["weights.safetensors", "results.json", "files.json"])
    def test_it_is_run_again_when_its_artifacts_are_gone(self, tracker: Tracker, lost: str) -> None:
        first = job([])
        (tracker.artifacts(first.run_id) / lost).unlink()
        said: list[str] = []
        second = job(said)
        assert not second.reused
        assert "its files are gone" in said[0]
        assert job([]).run_id == second.run_id

    def test_a_truncated_artifact_is_not_reused(self, tracker: Tracker) -> None:
        first = job([])
        path = tracker.artifacts(first.run_id) / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert not job([]).reused

    def test_a_deleted_run_is_not_reused(self, tracker: Tracker) -> None:
        first = job([])
        tracker.client.delete_run(first.run_id)
        assert not job([]).reused


class TestInterrupted:
    def test_kills_at_random_moments_change_no_bit(
        self, tracker: Tracker, workplace: Workplace
    ) -> None:
        undisturbed = job([], fresh=True)
        tracker.client.delete_run(undisturbed.run_id)
        moments = random.Random(0)
        for _ in range(4):
            before = checkpoint_time(workplace)
            process = workplace.start(job_in_a_process)
            while process.exitcode is None and checkpoint_time(workplace) == before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
            process.join()
        outcome = job([])
        assert outcome.results == undisturbed.results
        assert torch.equal(weights(outcome), weights(undisturbed))
        assert work_folders(workplace) == []
        running = tracker.client.search_runs([tracker.experiment_id], "status = 'RUNNING'")
        assert not running

    @pytest.mark.parametrize(
        "place", ["before the artifacts", "before the status", "after the status"]
    )
    def test_a_kill_while_it_finishes(
        self, tracker: Tracker, workplace: Workplace, place: str
    ) -> None:
        process = workplace.start(job_killed_at, place)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        ((run_id, status),) = runs(tracker)
        assert status == ("FINISHED" if place == "after the status" else "RUNNING")
        assert len(work_folders(workplace)) == 1
        outcome = job([])
        assert outcome.run_id == run_id
        assert outcome.reused == (place == "after the status")
        assert load_checkpoint(outcome.directory / "weights.safetensors").values["epoch"] == 20
        assert work_folders(workplace) == []

    def test_a_killed_step_goes_on_in_its_own_run(
        self, tracker: Tracker, workplace: Workplace
    ) -> None:
        process = workplace.start(job_in_a_process)
        deadline = time.monotonic() + 60
        while not list(workplace.folder.glob("home/steps/*/checkpoint.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        ((killed, status),) = runs(tracker)
        assert status == "RUNNING"
        said: list[str] = []
        outcome = job(said)
        assert said == [f"continuing count to twenty from its checkpoint (run {killed[:8]})"]
        assert outcome.run_id == killed
        assert runs(tracker) == [(killed, "FINISHED")]
        tags = RunLog(tracker, killed).tags()
        assert "failure" not in tags
        new_job = tracker.run(tags["mlflow.parentRunId"])
        assert new_job is not None
        assert (new_job.name, new_job.status) == ("job", "FINISHED")
        assert int(tags["process.pid"]) == os.getpid()

    def test_a_failed_step_goes_on_with_an_empty_folder(self, tracker: Tracker) -> None:
        failing = interrupt_at(7, NonFiniteLossError("loss is nan"))
        with pytest.raises(NonFiniteLossError):
            job([], body=failing)
        ((failed, status),) = runs(tracker)
        assert status == "FAILED"
        assert RunLog(tracker, failed).tags()["failure"] == "NonFiniteLossError: loss is nan"

        def goes_on(step: StepRun) -> Mapping[str, Any]:
            assert not list(step.directory.iterdir())
            return {"epoch": load_checkpoint(step.checkpoint).values["epoch"]}

        outcome = job([], body=goes_on)
        assert outcome.run_id == failed
        assert outcome.results == {"epoch": 7}
        assert sorted(path.name for path in outcome.directory.iterdir()) == [
            "files.json",
            "results.json",
        ]

    def test_without_a_checkpoint_it_starts_again_in_a_new_run(self, tracker: Tracker) -> None:
        def interrupted(_: StepRun) -> Mapping[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            return {}

        with pytest.raises(KeyboardInterrupt):
            job([], body=interrupted)
        ((killed, status),) = runs(tracker)
        assert status == "KILLED"
        said: list[str] = []
        assert job(said).run_id != killed
        assert said == []

    def test_fresh_forgets_the_checkpoint(self, tracker: Tracker) -> None:
        with pytest.raises(ValueError, match="boom"):
            job([], body=interrupt_at(7, ValueError("boom")))
        seen: list[bool] = []

        def body(step: StepRun) -> Mapping[str, Any]:
            seen.append(step.checkpoint.exists())
            return {}

        said: list[str] = []
        job(said, fresh=True, body=body)
        assert seen == [False]
        assert said == []
        assert len(runs(tracker)) == 2


def hold_the_step(ready: Any) -> None:
    def body(_: StepRun) -> Mapping[str, Any]:
        ready.set()
        time.sleep(60)
        return {}

    steps.code_digest = lambda: "the code"
    job([], body=body)


class TestLock:
    def test_a_step_that_another_process_runs(self, tracker: Tracker, workplace: Workplace) -> None:
        ready = PROCESSES.Event()
        process = workplace.start(hold_the_step, ready)
        assert ready.wait(60)
        try:
            with pytest.raises(NASError, match=f"being run by process {process.pid} on"):
                job([])
        finally:
            process.kill()
            process.join()
        assert job([]).results["epochs"] == 20


class TestDigest:
    def test_it_depends_on_name_inputs_and_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        digest = step_digest("search", {"a": 1, "b": [1, 2.5]})
        assert digest == step_digest("search", {"b": [1, 2.5], "a": 1})
        assert digest != step_digest("retrain", {"a": 1, "b": [1, 2.5]})
        assert digest != step_digest("search", {"a": 2, "b": [1, 2.5]})
        monkeypatch.setattr("pipeline.steps.code_digest", lambda: "other code")
        assert digest != step_digest("search", {"a": 1, "b": [1, 2.5]})

    def test_the_code_is_the_whole_library(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import nas

        shutil.copytree(Path(nas.__file__).parent, tmp_path / "nas")
        monkeypatch.setattr("nas.__file__", str(tmp_path / "nas" / "__init__.py"))
        before = code_digest.__wrapped__()
        assert before == code_digest.__wrapped__()
        with open(tmp_path / "nas" / "spaces" / "darts" / "__init__.py", "a") as file:
            file.write("\n")
        assert before != code_digest.__wrapped__()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x")])
    def test_an_input_that_is_no_json(self, value: object) -> None:
        with pytest.raises(ConfigurationError, match="the input 'lr' of the step 'search'"):
            step_digest("search", {"lr": value})


class TestHome:
    def test_it_is_where_the_environment_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NAS_TRANSFER_HOME", str(tmp_path / "a"))
        assert home() == tmp_path / "a"
        monkeypatch.delenv("NAS_TRANSFER_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
        assert home() == tmp_path / "b" / "nas-transfer"

    def test_it_cannot_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("NAS_TRANSFER_HOME", str(tmp_path / "file" / "home"))
        with pytest.raises(ConfigurationError, match="set NAS_TRANSFER_HOME"):
            home()

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import time
from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import psutil
import pytest
import torch
from workplace import PROCESSES, Workplace

from nas.errors import DataError, TrackingError
from pipeline.process import Interrupted, Process, interruptible
from pipeline.store import check_store, without_password
from pipeline.tracking import RunLog, Tracker, connect, trim

TASK = SimpleNamespace(
    name="shapes",
    description="Shapes drawn for this test.",
    digest="0123456789abcdef" * 4,
    classes=("round", "square"),
    shape=SimpleNamespace(channels=3, height=8, width=6, classes=2),
    splits=SimpleNamespace(train=torch.arange(5), val=torch.arange(2), test=torch.arange(3)),
)


def wait_in_a_run(run_ids: Queue[str]) -> None:
    with connect().open_run("job") as log:
        run_ids.put(log.run_id)
        time.sleep(60)


def status(tracker: Tracker, run_id: str) -> str:
    return tracker.client.get_run(run_id).info.status


def stop_myself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


class TestOpenRun:
    def test_nested_runs_finish_and_know_their_parent(self, tracker: Tracker) -> None:
        with tracker.open_run("transfer", tags={"method": "darts"}) as job:
            assert status(tracker, job.run_id) == "RUNNING"
            with tracker.open_run("search", parent=job) as step:
                pass
            assert status(tracker, step.run_id) == "FINISHED"
            assert status(tracker, job.run_id) == "RUNNING"
        assert status(tracker, job.run_id) == "FINISHED"
        assert [run.name for run in tracker.children(job.run_id)] == ["search"]
        tags = job.tags()
        assert tags["method"] == "darts"
        assert tags["process.host"] == socket.gethostname()
        assert int(tags["process.pid"]) == os.getpid()
        assert tags["device"]

    def test_a_crash_is_failed_with_its_reason(self, tracker: Tracker) -> None:
        with (
            pytest.raises(DataError),
            tracker.open_run("job") as job,
            tracker.open_run("s", parent=job) as step,
        ):
            raise DataError("no images in /pets " + "x" * 600)
        for log in (job, step):
            assert status(tracker, log.run_id) == "FAILED"
            assert log.tags()["failure"].startswith("DataError: no images in /pets")
            assert len(log.tags()["failure"]) == 500

    def test_stopped_in_the_middle_of_a_query(self, tracker: Tracker, workplace: Workplace) -> None:
        """Its cursor locks the file until the frames of the traceback let it go."""

        def read_and_stop() -> None:
            connection = sqlite3.connect(workplace.folder / "mlflow.db")
            cursor = connection.execute("SELECT name FROM sqlite_master")
            assert cursor.fetchone()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), tracker.open_run("job") as job:
            read_and_stop()
        assert status(tracker, job.run_id) == "KILLED"

    def test_ctrl_c_is_killed(self, tracker: Tracker) -> None:
        with pytest.raises(KeyboardInterrupt), tracker.open_run("job") as job:
            stop_myself(signal.SIGINT)
        assert status(tracker, job.run_id) == "KILLED"
        assert "failure" not in job.tags()

    def test_sigterm_is_killed_and_the_handlers_are_restored(self, tracker: Tracker) -> None:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with (
            pytest.raises(Interrupted),
            tracker.open_run("job") as job,
            tracker.open_run("step", parent=job) as step,
        ):
            stop_myself(signal.SIGTERM)
        assert status(tracker, job.run_id) == status(tracker, step.run_id) == "KILLED"
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def test_a_second_signal_does_not_disturb_the_cleaning_up(self) -> None:
        def stopped_twice() -> None:
            try:
                stop_myself(signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                cleaned.append("done")

        cleaned: list[str] = []
        with pytest.raises(KeyboardInterrupt), interruptible():
            stopped_twice()
        assert cleaned == ["done"]

    def test_another_process_stopped_by_sigint_is_killed(
        self, tracker: Tracker, workplace: Workplace
    ) -> None:
        run_ids = PROCESSES.Queue()
        process = workplace.start(wait_in_a_run, run_ids)
        run_id = run_ids.get(timeout=60)
        assert status(tracker, run_id) == "RUNNING"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=20)
        assert process.exitcode != 0
        assert status(tracker, run_id) == "KILLED"

    def test_it_takes_over_the_run_of_mlflow_run_once(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        experiment = tracker.client.create_experiment("by mlflow run")
        run = tracker.client.create_run(
            experiment, run_name="nimble-fox-123", tags={"mlflow.source.type": "PROJECT"}
        )
        tracker.client.log_param(run.info.run_id, "epochs", "03")
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        inherited = connect()
        assert "MLFLOW_RUN_ID" not in os.environ
        with inherited.open_run("transfer") as job:
            job.log_params({"epochs": 3, "seed": 0})
            with inherited.open_run("search", parent=job) as step:
                pass
        with inherited.open_run("another") as other:
            pass
        assert job.run_id == run.info.run_id
        assert len({job.run_id, step.run_id, other.run_id}) == 3
        stored = tracker.client.get_run(job.run_id)
        assert stored.info.run_name == "transfer"
        assert stored.data.tags["mlflow.source.type"] == "PROJECT"
        assert stored.data.params == {"epochs": "03", "seed": "0"}
        assert tracker.client.get_run(step.run_id).info.experiment_id == experiment

    def test_it_stays_killed_when_mlflow_run_marks_it_as_failed(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        with pytest.raises(KeyboardInterrupt), connect().open_run("transfer"):
            raise KeyboardInterrupt
        assert status(tracker, run_id) == "KILLED"
        tracker.client.set_terminated(run_id, "FAILED")
        deadline = time.monotonic() + 60
        while status(tracker, run_id) != "KILLED":
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_a_name_that_the_user_gave_stays(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tracker.client.create_run(tracker.experiment_id, run_name="My best try")
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        with connect().open_run("transfer"):
            pass
        assert tracker.client.get_run(run.info.run_id).info.run_name == "My best try"

    def test_system_metrics_are_sampled(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.tracking.SYSTEM_METRICS_SECONDS", 0.1)
        with tracker.open_run("job") as job, tracker.open_run("step", parent=job) as step:
            time.sleep(1)
        metrics = tracker.client.get_run(step.run_id).data.metrics
        assert metrics["system/cpu_utilization_percentage"] >= 0
        # the first metric of a job is what a comparison of jobs shows first
        assert not tracker.client.get_run(job.run_id).data.metrics

    def test_broken_system_metrics_do_not_reach_the_job(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("no sensors")

        monkeypatch.setattr("pipeline.tracking.SystemMetricsMonitor", broken)
        with tracker.open_run("job") as job, tracker.open_run("step", parent=job) as step:
            pass
        assert status(tracker, step.run_id) == "FINISHED"


class TestReaping:
    def test_runs_of_a_vanished_process_are_killed_and_no_others(self, tracker: Tracker) -> None:
        me = Process.current()

        def running(**tags: object) -> str:
            names = {f"process.{name}": str(value) for name, value in tags.items()}
            run = tracker.client.create_run(tracker.experiment_id, tags=names)
            return run.info.run_id

        children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        dead, alive = (
            running(host=me.host, pid=child.pid, started=psutil.Process(child.pid).create_time())
            for child in children
        )
        children[0].kill()
        children[0].wait()
        reused_pid = running(host=me.host, pid=me.pid, started=me.started - 100)
        mine = running(host=me.host, pid=me.pid, started=me.started)
        elsewhere = running(host="another-host", pid=2**22 + 1, started=1.0)
        foreign = running()
        try:
            connect()
        finally:
            children[1].kill()
            children[1].wait()
        for run_id in (dead, reused_pid):
            assert status(tracker, run_id) == "KILLED"
            assert RunLog(tracker, run_id).tags()["failure"] == "process vanished"
        for run_id in (alive, mine, elsewhere, foreign):
            assert status(tracker, run_id) == "RUNNING"

    def test_a_zombie_does_not_live(self) -> None:
        child = subprocess.Popen(["true"])
        process = psutil.Process(child.pid)
        started = process.create_time()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not Process("", child.pid, started).lives()
        child.wait()


class TestRunLog:
    @pytest.fixture
    def log(self, tracker: Tracker) -> RunLog:
        with tracker.open_run("job") as log:
            return log

    def test_metrics_keep_their_steps_and_what_is_not_finite(self, log: RunLog) -> None:
        log.log_metrics({"loss": 2.5, "accuracy": 0.5}, step=0)
        log.log_metrics({"loss": float("nan"), "accuracy": float("inf")}, step=1)
        history = log.tracker.client.get_metric_history(log.run_id, "loss")
        assert [entry.step for entry in history] == [0, 1]
        assert history[0].value == 2.5
        assert math.isnan(history[1].value)

    def test_more_metrics_and_parameters_than_one_call_takes(self, log: RunLog) -> None:
        log.log_metrics({f"m{number}": number for number in range(1001)})
        log.log_params({f"p{number}": number for number in range(101)})
        data = log.tracker.client.get_run(log.run_id).data
        assert data.metrics["m1000"] == 1000
        assert data.params["p100"] == "100"

    def test_long_values_are_trimmed(self, log: RunLog) -> None:
        log.log_params({"list": "x" * 7000})
        log.set_tags({"note": "y" * 9000})
        data = log.tracker.client.get_run(log.run_id).data
        assert data.params["list"] == "x" * 5999 + "…"
        assert len(data.tags["note"]) == 8000
        assert trim("short", 5) == "short"

    def test_artifacts_come_back(self, log: RunLog, tmp_path: Path) -> None:
        (tmp_path / "weights.bin").write_bytes(b"\x00\x01")
        log.log_artifact(tmp_path / "weights.bin")
        log.log_text("hello", "notes/hello.txt")
        log.log_json({"op": "skip_connect"}, "genotype.json")
        log.log_figure(matplotlib.figure.Figure(), "empty.png")
        folder = log.tracker.artifacts(log.run_id)
        assert (folder / "weights.bin").read_bytes() == b"\x00\x01"
        assert (folder / "notes/hello.txt").read_text() == "hello"
        assert json.loads((folder / "genotype.json").read_text()) == {"op": "skip_connect"}
        assert (folder / "empty.png").read_bytes().startswith(b"\x89PNG")

    def test_a_data_set_is_an_input_of_the_run(self, log: RunLog) -> None:
        log.log_dataset(TASK, "target")  # type: ignore[arg-type]
        run = log.tracker.client.get_run(log.run_id)
        (entry,) = run.inputs.dataset_inputs
        assert entry.dataset.name == "shapes"
        assert entry.dataset.digest == TASK.digest[:36]
        profile = json.loads(entry.dataset.profile)
        assert (profile["train"], profile["val"], profile["test"]) == (5, 2, 3)
        assert profile["num_rows"] == 10
        assert profile["classes"] == ["round", "square"]
        schema = json.loads(entry.dataset.schema)["mlflow_tensorspec"]
        assert json.loads(schema["features"])[0]["tensor-spec"]["shape"] == [-1, 8, 6, 3]
        summary = log.tracker.run(log.run_id)
        assert summary is not None
        assert [(data.digest, data.context) for data in summary.datasets] == [
            (TASK.digest, "target")
        ]

    def test_the_stores_refusal_is_one_sentence(self, log: RunLog, tmp_path: Path) -> None:
        with pytest.raises(TrackingError, match=r"did not keep absent\.bin"):
            log.log_artifact(tmp_path / "absent.bin")


class TestFinding:
    def test_by_step_digest_and_status(self, tracker: Tracker) -> None:
        tags = {"step": "search", "step.digest": "abc"}
        with tracker.open_run("job") as job:
            assert tracker.find_finished("search", "abc") is None
            with tracker.open_run("search", parent=job, tags=tags) as first:
                pass
            time.sleep(0.01)
            with tracker.open_run("search", parent=job, tags=tags) as second:
                pass
            with (
                pytest.raises(ValueError, match="boom"),
                tracker.open_run("search", parent=job, tags=tags) as failed,
            ):
                raise ValueError("boom")
        finished = tracker.find_finished("search", "abc")
        assert finished is not None
        assert finished.run_id == second.run_id != first.run_id
        assert finished.ended is not None
        interrupted = tracker.find_interrupted("search", "abc")
        assert interrupted is not None
        assert interrupted.run_id == failed.run_id
        assert tracker.find_finished("search", "abd") is None
        assert tracker.find_finished("retrain", "abc") is None

    def test_deleted_runs_are_not_found(self, tracker: Tracker) -> None:
        with tracker.open_run("x", tags={"step": "search", "step.digest": "abc"}) as log:
            pass
        tracker.client.delete_run(log.run_id)
        assert tracker.find_finished("search", "abc") is None
        assert tracker.run("0" * 32) is None


class TestConnecting:
    def test_the_experiment_is_the_one_the_environment_names(
        self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        get = tracker.client.get_experiment
        assert get(tracker.experiment_id).name == "nas-transfer"
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "pets")
        assert get(connect().experiment_id).name == "pets"
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        assert connect().experiment_id == "0"

    def test_a_deleted_experiment(self, tracker: Tracker) -> None:
        tracker.client.delete_experiment(tracker.experiment_id)
        with pytest.raises(TrackingError, match=r"'nas-transfer' was deleted: .*restore"):
            connect()

    def test_an_unknown_run(self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
        with pytest.raises(TrackingError, match="0000 not found"):
            connect()

    @pytest.mark.parametrize(
        "uri", ["http://user:secret@127.0.0.1:{port}", "postgresql://u:secret@127.0.0.1:{port}/db"]
    )
    def test_a_dead_server_is_told_within_seconds(
        self, uri: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
            port = closed.getsockname()[1]
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=port))
            start = time.monotonic()
            with pytest.raises(TrackingError, match=f"answers at .*127.0.0.1:{port}") as caught:
                connect()
        assert time.monotonic() - start < 3
        assert "secret" not in str(caught.value)

    def test_a_server_that_hangs(
        self, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.store.PROBE_SECONDS", 0.3)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            with pytest.raises(TrackingError, match="timed out"):
                check_store(f"http://127.0.0.1:{silent.getsockname()[1]}")

    def test_a_broken_sqlite_file(
        self, tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "broken.db").write_text("this is no database " * 100)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'broken.db'}")
        start = time.monotonic()
        with pytest.raises(TrackingError, match=r"broken.db cannot be used \(file is not a data"):
            connect()
        assert time.monotonic() - start < 3

    def test_a_sqlite_file_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TrackingError, match="cannot be used"):
            check_store(f"sqlite:///{tmp_path}/file/mlflow.db")

    def test_a_folder_is_no_store_any_more(
        self, tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
        with pytest.raises(TrackingError, match="migrate-filestore"):
            connect()

    def test_an_unknown_kind_of_store(
        self, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://example.org")
        with pytest.raises(TrackingError, match=r"gopher://example\.org cannot be used"):
            connect()

    def test_passwords_are_not_shown(self) -> None:
        assert without_password("https://me:x@host:1/a?b=c") == "https://host:1/a?b=c"
        assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"

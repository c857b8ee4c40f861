"""Puts the status of a stopped run right after `mlflow run` has overwritten it.

`mlflow run` means to leave a run alone that its own process has ended, but compares a status name
with status numbers and so marks every run that was stopped as FAILED. That happens when the job's
process is gone, so a small process that outlives it marks the run as KILLED once more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

WATCH_SECONDS = 20.0


def insist_on_killed(uri: str, run_id: str) -> None:
    """Start the process that watches ``run_id``; returns at once."""
    subprocess.Popen(
        [sys.executable, "-P", __file__, run_id],  # -P: our modules must not shadow others
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    )


def watch(run_id: str) -> None:
    """Wait until ``run_id`` is marked as FAILED, and mark it as KILLED."""
    from mlflow.tracking import MlflowClient  # takes seconds, which the job need not wait for

    client = MlflowClient()
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        info = client.get_run(run_id).info
        if info.status == "FAILED":
            client.set_terminated(run_id, "KILLED", info.end_time)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    watch(sys.argv[1])

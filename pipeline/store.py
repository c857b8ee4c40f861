"""Opens the MLflow store, or says within seconds why it cannot.

MLflow itself retries a dead server for minutes and a broken SQLite file for 100 seconds.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.tracking import MlflowClient

from nas.errors import TrackingError

EXPERIMENT = "nas-transfer"
KIND = "mlflow.experimentKind"  # without it the UI shows the pages of a language model's traces
PROBE_SECONDS = 5
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
UNAVAILABLE = (502, 503, 504)  # a proxy's word for a server that does not answer


@dataclass(frozen=True)
class Store:
    """A store that answers.

    Attributes:
        inherited_run: the run that `mlflow run` opened for this process to go on with.
    """

    client: MlflowClient
    experiment_id: str
    inherited_run: str | None


def open_store() -> Store:
    """Open the store and the experiment that MLflow's environment variables name.

    The store is MLFLOW_TRACKING_URI or MLflow's default, a SQLite file in the working directory.
    The experiment is that of MLFLOW_RUN_ID (set by `mlflow run`, and taken out of the environment
    here so that no child process resumes that run), else MLFLOW_EXPERIMENT_ID, else
    MLFLOW_EXPERIMENT_NAME, else "nas-transfer".

    Raises:
        TrackingError: the store does not answer or is none; the experiment was deleted.
    """
    _quieten()
    uri = mlflow.get_tracking_uri()
    check_store(uri)
    inherited = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        client = MlflowClient(uri)
        return Store(client, _find_experiment(client, inherited), inherited)
    except TrackingError:
        raise
    except Exception as error:  # a store fails with MLflow's, SQLAlchemy's or Alembic's errors
        raise TrackingError(
            f"the tracking store {without_password(uri)} cannot be used ({reason_of(error)}): set "
            "MLFLOW_TRACKING_URI to an MLflow server or to sqlite:///FILE"
        ) from error


def check_store(uri: str) -> None:
    """Return if the store at ``uri`` answers; whether it is an MLflow store is found out later.

    Raises:
        TrackingError: it does not answer, cannot be read, or is of a kind MLflow gave up.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in DATABASE_PORTS:
        _check_database(uri, DATABASE_PORTS[scheme])
    elif scheme in ("", "file"):
        _check_folder(uri)


def without_password(uri: str) -> str:
    """``uri`` without user name and password, to be shown."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(
            f"{without_password(uri).rstrip('/')}/health", timeout=PROBE_SECONDS
        ):
            return
    except urllib.error.HTTPError as error:
        if error.code not in UNAVAILABLE:
            return  # it may ask for a password, which MLflow's client knows
        reason = f"its proxy answers {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise _no_answer(uri, reason)


def _check_database(uri: str, default_port: int) -> None:
    parts = urlsplit(uri)
    try:
        address = (parts.hostname or "localhost", parts.port or default_port)
        with socket.create_connection(address, timeout=PROBE_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise _no_answer(uri, str(error)) from error


def _no_answer(uri: str, reason: str) -> TrackingError:
    return TrackingError(
        f"no tracking server answers at {without_password(uri)} ({reason}): start it, or set "
        "MLFLOW_TRACKING_URI to another one, or unset it for a local file"
    )


def _check_sqlite(uri: str) -> None:
    name = uri.split(":///", 1)[-1].partition("?")[0]
    if name in ("", ":memory:"):
        raise TrackingError(
            f"the tracking store {uri} would be gone with this process: name a file, as in "
            "sqlite:///mlflow.db"
        )
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError("it cannot be written")
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrackingError(
            f"the tracking store {path} cannot be used ({reason}): mend its permissions, move it "
            "away, or set MLFLOW_TRACKING_URI to another one"
        ) from error


def _check_folder(uri: str) -> None:
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true":
        return
    raise TrackingError(
        f"MLflow no longer keeps runs in a folder such as {uri}: move them with `mlflow "
        "migrate-filestore --source FOLDER --target sqlite:///mlflow.db` and set "
        "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
    )


def _find_experiment(client: MlflowClient, run_id: str | None) -> str:
    wanted_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if run_id:
        wanted_id = client.get_run(run_id).info.experiment_id
    found = client.get_experiment(wanted_id) if wanted_id else client.get_experiment_by_name(name)
    if found is None:
        found = client.get_experiment(client.create_experiment(name))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment '{found.name}' was deleted: `mlflow experiments restore -x "
            f"{found.experiment_id}` brings it back, MLFLOW_EXPERIMENT_NAME chooses another one"
        )
    if KIND not in found.tags:
        client.set_experiment_tag(found.experiment_id, KIND, "custom_model_development")
    return str(found.experiment_id)


def _quieten() -> None:
    """Keep MLflow's notices and progress bars out of the job's own output."""
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def reason_of(error: Exception) -> str:
    """The first line of what ``error`` says, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

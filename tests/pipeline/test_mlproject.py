"""MLproject says what the command line takes: the same parameters, with the same defaults."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer.main
import yaml
from mlflow.projects import _project_spec

from pipeline.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
PROJECT: Mapping[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRY_POINTS = (
    "main",
    "transfer",
    "search",
    "pretrain",
    "retrain",
    "evaluate",
    "distance",
    "study",
)


def options_of(command: str) -> dict[str, Any]:
    """The options of a command of ours by their long name, as in "source_size"."""
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {max(o.opts, key=len)[2:].replace("-", "_"): o for o in options if o.name != "help"}


def as_text(default: Any) -> str:
    """A default as MLflow hands it over; one that we decide is empty."""
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_there_are_these_entry_points_and_no_others() -> None:
    assert set(PROJECT["entry_points"]) == set(ENTRY_POINTS)
    assert set(typer.main.get_command(app).commands) == set(ENTRY_POINTS)  # type: ignore[attr-defined]
    assert PROJECT["entry_points"]["main"] == PROJECT["entry_points"]["transfer"]


@pytest.mark.parametrize("name", ENTRY_POINTS)
class TestEntryPoint:
    def test_parameters_and_defaults_are_those_of_the_command(self, name: str) -> None:
        parameters = PROJECT["entry_points"][name]["parameters"]
        options = options_of(name)
        assert list(parameters) == list(options)
        assert {key: str(value["default"]) for key, value in parameters.items()} == {
            key: as_text(option.default) for key, option in options.items()
        }

    def test_types_are_those_of_the_command(self, name: str) -> None:
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        hints = get_type_hints(inspect.unwrap(command.callback))
        del hints["context"]
        for option, parameter in zip(command.params, hints.values(), strict=False):
            key = max(option.opts, key=len)[2:].replace("-", "_")
            declared = PROJECT["entry_points"][name]["parameters"][key]["type"]
            assert declared == ("int" if parameter in (int, int | None) else "string"), key

    def test_every_parameter_is_passed_as_its_option(self, name: str) -> None:
        entry = PROJECT["entry_points"][name]
        program, *arguments = re.split(r"\s+(?=--)", entry["command"].strip())
        command = "transfer" if name == "main" else name
        assert program == f"python -m pipeline {command}"
        assert arguments == [f"--{key.replace('_', '-')} {{{key}}}" for key in entry["parameters"]]

    def test_mlflow_reads_it(self, name: str, tmp_path: Path) -> None:
        project = _project_spec.load_project(str(ROOT))
        command = project.get_entry_point(name).compute_command({"verbose": "true"}, str(tmp_path))
        assert re.search(r"--verbose true( |$)", command)
        assert re.search(r"--data ''( |$)", command)

    def test_every_option_is_described_and_grouped(self, name: str) -> None:
        for key, option in options_of(name).items():
            assert len(option.help) > 15, key
            assert option.help.endswith("."), key


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_help_names_every_parameter(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([name, "--help"]) == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for key, option in options_of(name).items():
        assert f"--{key.replace('_', '-')} " in shown
        assert " ".join(option.help.split()[:4]) in shown


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in ENTRY_POINTS[1:])


def test_python_env_needs_no_python_but_the_one_that_runs() -> None:
    environment = yaml.safe_load((ROOT / "python_env.yaml").read_text())
    assert "python" not in environment
    wanted = " ".join(environment["dependencies"])
    for file in re.findall(r"-[cr] (\S+)", wanted):
        assert (ROOT / file).is_file()

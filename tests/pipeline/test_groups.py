"""Groups of options become options, and come back as groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.groups import CompareOptions, NetworkOptions, SearchOptions, expanded
from pipeline.presets import find_preset


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1, help="Pixels.")] = 3
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None


@dataclass(frozen=True)
class Colour:
    colour: Annotated[str, typer.Option(help="By name.")] = "red"


def call(*arguments: str) -> tuple[int, list[Any]]:
    """The exit status of a small program, and what it was given."""
    calls: list[Any] = []
    app = typer.Typer()

    @app.command()
    @expanded
    def draw(context: typer.Context, size: Size, colour: Colour, name: str = "box") -> None:
        """Draw a box."""
        calls.append((type(context).__name__, size, colour, name))

    return CliRunner().invoke(app, list(arguments)).exit_code, calls


def test_a_command_gets_whole_groups() -> None:
    status, calls = call("--height", "7", "--name", "lid", "--colour", "blue")
    assert status == 0
    assert calls == [("Context", Size(3, 7), Colour("blue"), "lid")]


def test_defaults_are_those_of_the_groups() -> None:
    assert call() == (0, [("Context", Size(), Colour(), "box")])


@pytest.mark.parametrize("arguments", [("--width", "0"), ("--size", "3"), ("--height", "tall")])
def test_options_are_checked_as_they_say(arguments: tuple[str, str]) -> None:
    assert call(*arguments) == (2, [])


def test_own_options_come_before_those_of_groups() -> None:
    app = typer.Typer(add_completion=False)

    def draw(size: Size, name: str = "box") -> None:
        """Draw a box."""

    app.command()(expanded(draw))
    command = typer.main.get_command(app)
    assert [option.name for option in command.params] == ["name", "width", "height"]
    assert command.help == "Draw a box."


def test_what_is_not_given_is_the_presets() -> None:
    preset = find_preset("quick")
    assert SearchOptions().config(preset) == preset.search(SearchOptions().searcher)
    stack = NetworkOptions().stack(preset)
    assert (stack.channels, stack.cells) == (preset.channels, preset.cells)
    assert NetworkOptions(max_macs="3M").stack(preset).channels is None
    compare = CompareOptions().settings(preset, "animals")
    assert (compare.training, compare.least_steps) == (preset.training, preset.least_steps)
    assert CompareOptions(train_epochs=2).settings(preset, "animals").least_steps == 0

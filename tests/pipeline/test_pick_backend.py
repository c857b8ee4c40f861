"""Who computes a search: chosen before all else, said once, and part of what the step is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from workplace import Workplace

import pipeline.searches
from nas.data import ImageTask, batches
from nas.ops import build
from nas.ops.backend import Backend
from nas.ops.recipe import source_folder
from nas.search import METHODS, BilevelSearch, SearchConfig
from nas.spaces.darts.supernet import SupernetConfig
from pipeline.cli import main
from pipeline.job import Machine
from pipeline.searches import say_choices

TINY = ["--source-limit", "200", "--search-epochs", "1", "--search-cells", "3"]
SEARCH = ["search", *TINY, "--search-channels", "2", "--device", "cpu", "--backend"]
NATIVE = Backend("native", "avx2, g++ 12.2.0, torch 2.15.0, AVX2 or portable by processor, OpenMP")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the extension is tried to be compiled, and cannot be."""

    def load(say: Callable[[str], None]) -> build.Extension:
        say("compiling the native kernels")
        return build.Extension(None, "there is no compiler")

    monkeypatch.setattr(build, "load", load)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has native kernels, as far as a job sees; the folder of their sources."""

    def search(*arguments: Any, backend: str, **options: Any) -> BilevelSearch:
        assert backend == "native"
        return BilevelSearch(*arguments, backend="eager", **options)

    monkeypatch.setattr(pipeline.searches, "choose", lambda *_: NATIVE)
    monkeypatch.setattr(pipeline.searches, "BilevelSearch", search)
    sources = shutil.copytree(source_folder(), tmp_path / "sources")
    monkeypatch.setattr(pipeline.searches, "source_folder", lambda: sources)
    return sources


def steps(place: Workplace) -> list[Run]:
    """The search steps of the store, the first first."""
    client = MlflowClient(place.variables["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    oldest_first = ["attributes.start_time ASC"]
    return list(client.search_runs(experiments, "tags.step = 'search'", order_by=oldest_first))


def test_a_backend_is_tagged_said_once_and_searches_for_itself_alone(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert main([*SEARCH, "eager"]) == 0
    assert re.findall("^kernels: .*$", capsys.readouterr().out, re.MULTILINE) == [
        "kernels: eager (as asked for)"
    ]
    sources = request.getfixturevalue("native")
    assert main([*SEARCH, "native"]) == 0
    output = capsys.readouterr().out
    assert re.findall("^kernels: .*$", output, re.MULTILINE) == [
        "kernels: native (avx2, g++ 12.2.0)"
    ]
    assert "reusing" not in output
    assert [run.data.tags["backend"] for run in steps(workplace)] == ["eager", "native"]

    # The same is reused, by whatever word it was asked for; other sources are another step.
    assert main([*SEARCH, "auto"]) == 0
    assert "reusing search on digits" in capsys.readouterr().out
    with (sources / "bindings.cpp").open("a") as file:
        file.write("// another rounding\n")
    assert main([*SEARCH, "auto"]) == 0
    assert "reusing" not in capsys.readouterr().out
    assert [run.data.tags["backend"] for run in steps(workplace)] == ["eager", "native", "native"]
    assert len({run.data.tags["step.digest"] for run in steps(workplace)}) == 3


@pytest.mark.parametrize("entry_point", ["search", "transfer"])
@pytest.mark.usefixtures("no_compiler")
def test_wanted_kernels_that_cannot_be_had_are_told_before_anything_is_done(
    entry_point: str, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([entry_point, "--backend", "native", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.err == (
        "error: no native kernels: there is no compiler; backend 'eager' does without\n"
    )
    assert shown.out == "compiling the native kernels\n"
    client = MlflowClient(workplace.variables["MLFLOW_TRACKING_URI"])
    assert client.search_runs([e.experiment_id for e in client.search_experiments()]) == []


@pytest.mark.usefixtures("no_compiler")
def test_auto_goes_on_without_and_says_why(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SEARCH, "auto"]) == 0
    assert "\nkernels: eager (there is no compiler)\n" in capsys.readouterr().out
    (step,) = steps(workplace)
    assert step.data.tags["backend"] == "eager"


def test_native_kernels_compute_the_search(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    extension = build.load()
    if extension.module is None:
        pytest.skip(extension.reason)
    assert main([*SEARCH, "native"]) == 0
    used = extension.module.build_info()
    words = f"{used['instruction_set']}, {used['compiler']}"
    assert f"kernels: native ({words})\n" in capsys.readouterr().out
    (step,) = steps(workplace)
    assert step.data.tags["backend"] == "native"


def test_storage_is_tagged_and_searches_for_itself_alone(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for storage in ("float32", "bfloat16"):
        assert main([*SEARCH, "eager", "--storage", storage]) == 0
        assert "reusing" not in capsys.readouterr().out
    assert [run.data.tags["storage"] for run in steps(workplace)] == ["float32", "bfloat16"]
    assert main([*SEARCH, "eager", "--storage", "bfloat16"]) == 0
    assert "reusing search on digits" in capsys.readouterr().out


def test_where_images_lie_is_said_where_there_is_a_choice(
    few_digits: ImageTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(supernet=SupernetConfig(2, 3))
    for free, place in ((2**30, "on the meta"), (0, "in memory, too many for the meta's")):
        monkeypatch.setattr(batches, "free_memory", lambda _, free=free: free)
        device = torch.device("meta")
        search = BilevelSearch(few_digits, METHODS["darts"], config, seed=0, device=device)
        say_choices(search, Machine())
        assert capsys.readouterr().out == f"images of digits: {place}\n"


def test_what_comes_of_asking_for_graphs_is_said_and_tagged(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SEARCH, "eager", "--cuda-graphs", "auto"]) == 0
    said = re.findall("^CUDA graphs: .*$", capsys.readouterr().out, re.MULTILINE)
    assert said == ["CUDA graphs: off (the search runs on the cpu)"]
    (step,) = steps(workplace)
    assert step.data.tags["cuda_graphs"] == "off"

    # They change no result: the search is not run again for them, and off is not worth a word.
    assert main([*SEARCH, "eager", "--cuda-graphs", "off"]) == 0
    shown = capsys.readouterr().out
    assert "reusing search on digits" in shown
    assert "CUDA graphs" not in shown

"""The benchmark that judges the kernels: what it counts, what it believes, and what it writes."""

from __future__ import annotations

import copy
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reference_supernet import reference_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.supernet.agreement import Evidence, check_agreement
from benchmarks.supernet.authors import named_as_theirs
from benchmarks.supernet.floors import Rates, find_floors, measure_rates, multiply_adds
from benchmarks.supernet.memory import Memory
from benchmarks.supernet.opponents import Ours, make_opponent, take_turn
from benchmarks.supernet.report import Row, floor_tables, row_tables, speed_up
from benchmarks.supernet.setting import (
    DisagreementError,
    Setting,
    UnavailableError,
    embedded_setting,
    paper_setting,
    quick_setting,
)
from benchmarks.supernet.timing import Budget, Spread, summarise, take_turns
from benchmarks.supernet_step import main
from nas.errors import ConfigurationError
from nas.search import find_method
from nas.spaces.darts.supernet import Supernet

FIELDS = {
    *("method", "implementation", "phase", "size", "batch", "dtype", "threads"),
    *("median_ms", "min_ms", "max_ms", "peak_mb", "trusted"),
}


def test_one_command_measures_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    arguments = ["--quick", "--method", "pcdarts", "--threads", "1", "--floors"]
    files = ["--json", str(json_file), "--picture", str(picture)]
    assert main([*arguments, *files, "--implementations", "eager", "authors"]) == 0
    report = json.loads(json_file.read_text())
    assert report["machine"]["torch"] == torch.__version__
    phases = ["forward", "backward", "step"]
    assert [row["phase"] for row in report["rows"]] == phases
    for row in report["rows"]:
        assert row.keys() >= FIELDS
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["peak_mb"] > row["idle_mb"] > 0
    assert {floor["phase"] for floor in report["floors"]} == {*phases, "architecture step"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "authors is left out: --peers says where" in capsys.readouterr().out


@pytest.mark.usefixtures("native")
def test_storage_in_bfloat16_has_rows_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--quick", "--method", "pcdarts", "--threads", "1", "--json", str(file)]
    assert main([*arguments, "--implementations", "native", "native bfloat16"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["implementation"], row["dtype"]) for row in rows if row["phase"] == "step"] == [
        ("native", "float32"),
        ("native", "bfloat16"),
    ]
    assert "native bf16" in capsys.readouterr().out


def test_every_phase_of_darts_is_timed_and_the_steps_move_what_they_should() -> None:
    setting = quick_setting("darts")
    opponent = make_opponent("eager", setting)
    assert isinstance(opponent, Ours)
    supernet = opponent.search.supernet
    alphas, weights = supernet.alphas.clone(), supernet.weights.clone()
    assert take_turn(opponent, ["forward"]).keys() == {"forward", "backward"}
    assert torch.equal(supernet.weights, weights)
    opponent.second_order()
    assert torch.equal(supernet.weights, weights)
    assert not torch.equal(supernet.alphas, alphas)
    opponent.step()
    assert not torch.equal(supernet.weights, weights)
    assert opponent.search.method.name == "darts"


def test_a_wrong_place_for_peers_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--method", "pcdarts", "--threads", "1", "--peers", str(tmp_path)]
    assert main([*arguments, "--implementations", "authors"]) == 1
    assert "github.com/yuhuixu1993/PC-DARTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "999"], "--threads 999: this machine has 1 to"),
        (["--repetitions", "2"], "at least 5"),
        (["--batch", "1"], "--batch 1 must be at least 2"),
        (["--json", "nowhere/rows.json"], "no folder nowhere to write rows.json to"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "gflop"), [("darts", 4.8), ("pcdarts", 0.9)], ids=["darts", "pcdarts"]
)
def test_arithmetic_of_the_papers_supernets(method: str, gflop: float) -> None:
    forward, *_ = find_floors(paper_setting(method, 32, 8, second_order=False), Rates(1, 100, 30))
    assert forward.gflop == pytest.approx(gflop, rel=0.01)
    assert forward.arithmetic_ms == pytest.approx(10 * gflop, rel=0.01)


@pytest.mark.parametrize("setting", [quick_setting("darts"), embedded_setting("pcdarts")])
def test_multiply_adds_are_those_that_pytorch_counts(setting: Setting) -> None:
    supernet = Supernet(setting.shape, setting.supernet, seed=0, backend="eager")
    mixing = find_method(setting.method).mixing(supernet).detach()
    images = torch.zeros(2, setting.image_channels, setting.size, setting.size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        supernet(images, mixing)
    assert 2 * 2 * multiply_adds(supernet) == counter.get_total_flops()


def test_rates_without_a_second_core_are_not_trusted() -> None:
    answers = iter([True, False, True, True, False])
    assert measure_rates(1, lambda: next(answers), tries=2).trusted
    assert list(answers) == [False]
    assert not measure_rates(1, lambda: False, tries=1).trusted


class Clock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def turn(clock: Clock, log: list[str], name: str, seconds: float) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        clock.now += seconds
        log.append(name)
        return {"step": 1000 * seconds}

    return run


def test_implementations_take_turns_and_a_slow_one_gets_fewer() -> None:
    clock, log = Clock(), []
    turns = {name: turn(clock, log, name, s) for name, s in (("slow", 10.0), ("fast", 1.0))}
    budget = Budget(warmups=2, repetitions=7, least=5, seconds=20)
    samples = take_turns(turns, budget, clock=clock)
    assert log == ["slow", "fast"] * (2 + 5) + ["fast"] * 2
    assert [len(samples[name]) for name in turns] == [5, 7]
    assert summarise(samples["slow"], "step", 5) == Spread(10_000, 10_000, 10_000, 5, True)


def test_a_turn_between_unclean_probes_is_taken_again() -> None:
    clock, log = Clock(), []
    answers: Iterator[bool] = iter([True, True, False, *[True] * 9])
    budget = Budget(warmups=0, repetitions=3, least=3, seconds=100)
    turns = {"one": turn(clock, log, "one", 1.0)}
    samples = take_turns(turns, budget, lambda: next(answers), clock)["one"]
    assert [sample.trusted for sample in samples] == [True, False, False, True, True]
    assert summarise(samples, "step", 3).trusted
    assert summarise(samples, "step", 3).count == 3


def test_without_a_second_core_the_row_is_marked() -> None:
    clock, log = Clock(), []
    budget = Budget(warmups=0, repetitions=4, least=2, seconds=100, patience=3)
    turns = {"one": turn(clock, log, "one", 1.0)}
    samples = take_turns(turns, budget, lambda: False, clock)["one"]
    assert len(samples) == 12  # three times as often, then it gives up
    assert not summarise(samples, "step", 2).trusted


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_their_names_cover_every_weight_once(method: str) -> None:
    setting = quick_setting(method)
    supernet = Supernet(setting.shape, setting.supernet, seed=0, backend="eager")
    twin = copy.deepcopy(supernet)
    theirs = dict(named_as_theirs(supernet))
    assert sum(view.numel() for view in theirs.values()) == supernet.weights.numel()
    with torch.no_grad():
        twin.weights.zero_()
        for name, view in named_as_theirs(twin):
            view.copy_(theirs[name])
    assert torch.equal(twin.weights, supernet.weights)


def test_their_layout_is_that_of_the_reference() -> None:
    """The reference was written from the paper; its weights have tests of their own."""
    setting = quick_setting("darts")
    supernet = Supernet(setting.shape, setting.supernet, seed=0, backend="eager")
    reference = reference_of(supernet)
    theirs = dict(named_as_theirs(supernet))
    cell, edge = reference.cells[1], reference.cells[1].edges[0]
    pairs: dict[str, Tensor] = {
        "stem.0.weight": reference.stem[0].weight,
        "classifier.weight": reference.classifier.weight,
        "cells.1.preprocess1.op.1.weight": cell.preprocess1.conv.weight,
        "cells.2.preprocess0.conv_2.weight": reference.cells[2].preprocess0.odd.weight,
        "cells.1._ops.0._ops.3.conv_1.weight": edge.ops[3].even.weight,
        "cells.1._ops.0._ops.4.op.1.weight": edge.ops[4][1].weight,
        "cells.1._ops.0._ops.4.op.6.weight": edge.ops[4][6].weight,
        "cells.1._ops.0._ops.5.op.5.weight": edge.ops[5][5].weight,
        "cells.1._ops.0._ops.6.op.2.weight": edge.ops[6][2].weight,
        "cells.1._ops.0._ops.7.op.1.weight": edge.ops[7][1].weight,
    }
    for name, weight in pairs.items():
        assert torch.equal(theirs[name].double(), weight), name


def test_an_implementation_that_computes_something_else_is_not_timed() -> None:
    setting = quick_setting("pcdarts")
    expected = make_opponent("eager", setting).evidence()
    check_agreement("native", make_opponent("eager", setting).evidence(), expected)
    swapped = Evidence(expected.scores, expected.weights.flip(0), expected.architecture)
    with pytest.raises(DisagreementError, match=r"'native' .* gradient of the weights is off"):
        check_agreement("native", swapped, expected)
    nothing = torch.full_like(expected.scores, torch.nan)
    broken = Evidence(nothing, expected.weights, expected.architecture)
    with pytest.raises(DisagreementError, match="scores"):
        check_agreement("native", broken, expected)


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_storage_in_bfloat16_agrees_but_for_its_rounding(method: str) -> None:
    expected = make_opponent("eager", quick_setting(method)).evidence()
    found = make_opponent("eager bfloat16", quick_setting(method)).evidence()
    check_agreement("eager bfloat16", found, expected, "bfloat16")
    with pytest.raises(DisagreementError):
        check_agreement("eager bfloat16", found, expected)


FAKE_NETWORK = """
    import operations
    class Network:
        def __init__(self, *arguments):
            raise AssertionError("is not built")
"""


def test_their_modules_leave_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "darts" / "cnn"
    folder.mkdir(parents=True)
    (folder / "operations.py").write_text("")
    (folder / "model_search.py").write_text(textwrap.dedent(FAKE_NETWORK))
    (folder / "architect.py").write_text("")
    (folder / "genotypes.py").write_text("PRIMITIVES = ['none']")
    with pytest.raises(ConfigurationError, match="not the published space"):
        make_opponent("authors", quick_setting("darts"), tmp_path)
    assert not {"model_search", "architect", "genotypes", "operations"} & set(sys.modules)
    assert str(folder) not in sys.path
    assert not list(folder.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (embedded_setting("darts"), "images of 3 channels, not 1"),
        (paper_setting("darts", 30, 8, second_order=False), "even sizes only"),
    ],
)
def test_what_their_code_cannot_build_is_left_out(setting: Setting, reason: str) -> None:
    with pytest.raises(UnavailableError, match=reason):
        make_opponent("authors", setting, Path("anywhere"))


def test_factors_are_over_the_rival_of_the_same_place() -> None:
    setting, other = quick_setting("darts"), quick_setting("pcdarts")
    memory = Memory(200.0, {"step": 300.0, "forward": 250.0}, 1.0)

    def row(setting: Setting, name: str, median: float, threads: int = 1) -> Row:
        times = Spread(median, median, median, 7, True)
        return Row(setting, name, "float32", "step", threads, times, memory, 0.0)

    rows = [row(setting, "authors", 90), row(other, "authors", 50), row(setting, "native", 30)]
    rows.append(row(setting, "native", 20, threads=2))
    assert speed_up(rows[2], "authors", rows) == 3
    assert speed_up(rows[3], "authors", rows) is None
    assert speed_up(rows[0], "authors", rows) is None
    rates = Rates(1, 100.0, 30.0)
    assert [table.row_count for table in row_tables(rows)] == [2, 1, 1]
    floors = find_floors(setting, rates)
    assert [table.row_count for table in floor_tables(floors, [rates], rows)] == [5]


def test_a_setting_survives_the_way_to_another_process() -> None:
    setting = embedded_setting("pcdarts")
    assert Setting.from_json(json.loads(json.dumps(setting.to_json()))) == setting

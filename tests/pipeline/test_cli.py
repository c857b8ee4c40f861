"""What the command line understands, and the one sentence it says where something is wrong."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from workplace import Workplace

from nas.errors import ConfigurationError
from nas.search.stopping import Stopping
from nas.transfer.supernet import WarmStartOptions
from pipeline import cli
from pipeline.cli import main
from pipeline.evaluate import EvaluateSettings
from pipeline.job import Machine
from pipeline.presets import find_preset
from pipeline.retrain import RetrainSettings
from pipeline.search import SearchSettings
from pipeline.settings import DataSettings
from pipeline.transfer import TransferSettings
from pipeline.warm import WarmSettings

ROOT = Path(__file__).resolve().parents[2]
TINY = "--source-limit 200 --search-epochs 1 --search-cells 3 --search-channels 4"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Machine]]:
    """What the entry points would be called with, instead of calling them."""
    calls: list[tuple[Any, Machine]] = []
    for name in ("transfer", "search", "pretrain", "retrain", "evaluate"):
        monkeypatch.setattr(cli, name, lambda settings, machine: calls.append((settings, machine)))
    return calls


@pytest.fixture
def fails(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[str, int]]:
    """Run a command that must fail; its one sentence, and the number of runs that it opened."""

    def run(command: str) -> tuple[str, int]:
        assert main(shlex.split(command)) == 1
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        (line,) = shown.err.splitlines()
        assert line.startswith("error: ")
        return line, runs_of(workplace)

    return run


def runs_of(place: Workplace) -> int:
    client = MlflowClient(place.variables["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert all(run.info.status == "FAILED" and run.data.tags["failure"] for run in runs)
    return len(runs)


def make_folder(path: Path, classes: dict[str, int], size: int = 12) -> Path:
    """A folder a class, with so many images, no two alike."""
    for label, (name, count) in enumerate(classes.items()):
        (path / name).mkdir(parents=True)
        for number in range(count):
            rng = torch.Generator().manual_seed(1000 * label + number)
            pixels = torch.randint(256, (size, size), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path / name / f"{number}.png")
    return path


class TestKnownWithoutData:
    """Errors that need no data are told before there is a run."""

    @pytest.mark.parametrize(
        ("command", "parts"),
        [
            ("transfer --source digts", ["unknown data set 'digts'", "did you mean 'digits'?"]),
            ("transfer --target animal", ["'animal'", "did you mean 'animals'?"]),
            ("main --target animal", ["did you mean 'animals'?"]),
            ("search --source cifar-10", ["did you mean 'cifar10'?"]),
            ("retrain --target emnists", ["did you mean 'emnist'?"]),
            ("evaluate --target anmials", ["did you mean 'animals'?"]),
            ("transfer --method dart", ["unknown search method 'dart'", "did you mean 'darts'?"]),
            ("search --method pc-darts", ["did you mean 'pcdarts'?"]),
            ("transfer --preset quik", ["unknown preset", "did you mean 'quick'?"]),
            ("search --preset paper-cfar", ["did you mean 'paper-cifar'?"]),
            ("transfer --transfer cel", ["unknown transfer 'cel'", "did you mean 'cell'?"]),
            ("transfer --channels 7", ["even number of channels", "7"]),
            ("retrain --channels 7", ["even number of channels", "7"]),
            ("transfer --search-channels 5 --method pcdarts", ["even number of channels", "5"]),
            ("search --search-cells 2", ["2 cells", "at least 3"]),
            ("transfer --stem cifr", ["'cifar' or 'imagenet'", "'cifr'"]),
            ("transfer --channels 8 --max-macs 600M", ["(8)", "(600000000)", "not both"]),
            ("transfer --max-macs lots", ["'lots'", "600M"]),
            ("transfer --max-macs 0", ["'0'"]),
            ("retrain --max-macs -5M", ["'-5M'"]),
            ("search --search-batch-size 1", ["batch size of at least 2"]),
            ("transfer --train-batch-size 1", ["batch size of at least 2"]),
            ("transfer --model-name a/b", ["'a/b'", "--model-name"]),
            ("retrain --model-name models:x", ["'models:x'", "--model-name"]),
            ("transfer --device gpu", ["unknown device 'gpu'", "auto"]),
            ("search --device cuda:77", ["'cuda:77'"]),
            ("search --backend nativ", ["unknown backend 'nativ'", "did you mean 'native'?"]),
            ("transfer --backend egaer", ["did you mean 'eager'?"]),
            ("search --storage half", ["unknown storage 'half'", "bfloat16, float32"]),
            ("pretrain --storage bfloat", ["did you mean 'bfloat16'?"]),
            ("search --cuda-graphs on", ["unknown choice of CUDA graphs 'on'", "auto, off"]),
            ("transfer --source auto", ["'auto'", "add --transfer supernet"]),
            ("transfer --source supernet-digits/3", ["digits/3'", "add --transfer supernet"]),
            ("transfer --source run:0123", ["'run:0123'", "or name a data set"]),
            ("transfer --warm-what alpha", ["'alpha'", "did you mean 'alphas'?"]),
            ("search --warm-start auto --alpha-temperature 0.5", ["at least 1", "0.5"]),
            ("transfer --learning-rate-scale 0", ["above 0", "0.0"]),
            ("search --warm-start auto --warm-what operations", ["at least 1 runs", "not 0"]),
            ("transfer --warm-stages 2", ["'operations'", "'both'"]),
            ("search --stop platau", ["unknown rule", "did you mean 'plateau'?"]),
            ("pretrain --sources digits,anmials", ["did you mean 'animals'?"]),
            ("pretrain --sources digits,digits", ["--sources", "digits,digits"]),
            ("pretrain --sources ,", ["--sources", "none"]),
        ],
    )
    def test_it(self, fails: Callable[..., Any], command: str, parts: list[str]) -> None:
        message, runs = fails(command)
        assert all(part in message for part in parts), message
        assert runs == 0

    @pytest.mark.parametrize(
        "command",
        [
            "transfer --seeds none",
            "transfer --seeds 0",
            "transfer --seed -1",
            "transfer --search-epochs 0",
            "search --source-limit -3",
            "transfer --sede 3",
            "serach",
            "",
        ],
    )
    def test_what_is_no_number_or_no_option(
        self, command: str, capsys: pytest.CaptureFixture[str], workplace: Workplace
    ) -> None:
        assert main(shlex.split(command)) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert "Usage: python -m pipeline" in shown.out + shown.err
        assert runs_of(workplace) == 0


class TestData:
    """What only the data can tell: the run says why it failed."""

    def test_a_missing_folder(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        message, runs = fails(f"search --source folder:{tmp_path}/none")
        assert f"'{tmp_path}/none' does not exist" in message
        assert runs == 1

    def test_an_empty_folder(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "0 class folder" in fails(f"search --source folder:{tmp_path}/empty")[0]

    def test_an_empty_class(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        (make_folder(tmp_path / "pets", {"cat": 9, "dog": 9}) / "emu").mkdir()
        message, _ = fails(f"transfer --target folder:{tmp_path}/pets --source-limit 200")
        assert "emu' holds no images" in message

    def test_a_single_class(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        make_folder(tmp_path / "pets", {"cat": 9})
        message, _ = fails(f"retrain --target folder:{tmp_path}/pets")
        assert "1 class folder" in message
        assert "at least two" in message

    def test_images_that_do_not_decode(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        pets = make_folder(tmp_path / "pets", {"cat": 9, "dog": 9})
        (pets / "cat" / "3.png").write_bytes(b"no image")
        whole = (pets / "dog" / "2.png").read_bytes()
        (pets / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
        message, _ = fails(f"search --source folder:{pets}")
        assert "2 image(s) do not decode" in message
        assert "cat/3.png" in message
        assert "dog/2.png" in message

    def test_a_class_with_too_few_images(self, fails: Callable[..., Any], tmp_path: Path) -> None:
        make_folder(tmp_path / "pets", {"cat": 9, "dog": 2})
        message, _ = fails(f"search --source folder:{tmp_path}/pets")
        assert "class 'dog' has 2 different image(s)" in message

    def test_a_limit_that_leaves_too_few(self, fails: Callable[..., Any]) -> None:
        assert "at least 30 are needed" in fails("search --source-limit 10")[0]

    @pytest.mark.parametrize("size", [0, 3, 5000, -1])
    def test_impossible_sizes(self, fails: Callable[..., Any], size: int) -> None:
        message, _ = fails(f"transfer --source-limit 200 --target-size {size}")
        assert str(size) in message
        assert "between 4 and 1024" in message

    def test_a_limit_that_no_network_keeps_is_told_before_the_search(
        self, fails: Callable[..., Any]
    ) -> None:
        message, runs = fails(f"transfer {TINY} --target digits --target-limit 200 --max-macs 1k")
        assert "above the limit of 1000" in message
        assert runs == 1  # the job's own: no step was begun

    def test_an_architecture_that_does_not_exist(self, fails: Callable[..., Any]) -> None:
        message, _ = fails("retrain --architecture DARTS_V3 --target digits")
        assert "did you mean 'DARTS_V" in message

    def test_a_model_that_does_not_exist(self, fails: Callable[..., Any]) -> None:
        message, _ = fails("evaluate --model nas-nothing")
        assert "no model 'nas-nothing' is registered" in message


class TestMachine:
    def test_a_server_that_does_not_answer(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert main(["transfer"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"no tracking server answers at {address}" in line
        assert "Connection refused" in line

    def test_a_home_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[..., Any]
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("NAS_TRANSFER_HOME", str(tmp_path / "file" / "home"))
        message, runs = fails("transfer")
        assert "set NAS_TRANSFER_HOME" in message
        assert runs == 0

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_home_that_may_not_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[..., Any]
    ) -> None:
        (tmp_path / "locked").mkdir(mode=0o500)
        monkeypatch.setenv("NAS_TRANSFER_HOME", str(tmp_path / "locked" / "home"))
        assert "set NAS_TRANSFER_HOME" in fails("transfer")[0]

    def test_verbose_shows_the_traceback(self, workplace: Workplace) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "search", "--source", "digts", "--verbose", "true"],
            cwd=ROOT,
            env={**os.environ, **workplace.variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "UnknownNameError: unknown data set 'digts'" in done.stderr

    def test_an_error_nobody_expected_is_one_sentence_too(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("division by zero")

        monkeypatch.setattr(cli, "search", broken)
        assert main(["search"]) == 1
        assert capsys.readouterr().err == (
            "error: division by zero (ZeroDivisionError; --verbose shows where)\n"
        )
        with pytest.raises(ZeroDivisionError):
            main(["search", "--verbose"])

    def test_ctrl_c_says_how_to_go_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "search", interrupted)
        assert main(["search"]) == 130
        (line,) = capsys.readouterr().err.split("\n")[:-1]
        assert line == "interrupted; start it again with the same options to go on"


Asked = list[tuple[Any, Machine]]


class TestOptions:
    def test_defaults_are_the_presets(self, asked: Asked) -> None:
        assert main(["transfer"]) == 0
        ((settings, machine),) = asked
        assert isinstance(settings, TransferSettings)
        preset = find_preset("quick")
        assert settings.search == preset.search(settings.method)
        assert settings.compare.training == preset.training
        assert (settings.stack.channels, settings.stack.cells) == (8, 4)
        assert settings.source == DataSettings("digits", None, None, preset.largest)
        assert settings.target == DataSettings("animals", None, None, preset.largest)
        assert settings.compare.model_name == "nas-animals"
        assert replace(machine, options={}) == Machine("auto", 0, None, 1, None, False)

    @pytest.mark.parametrize("name", ["main", "transfer", "search", "retrain", "evaluate"])
    def test_options_are_logged_as_mlflow_run_does(self, asked: Asked, name: str) -> None:
        assert main([name, "--target-size" if name != "search" else "--source-size", "9"]) == 0
        project = yaml.safe_load((ROOT / "MLproject").read_text())
        parameters = project["entry_points"][name]["parameters"]
        wanted = {key: shlex.quote(str(value["default"])) for key, value in parameters.items()}
        wanted["source_size" if name == "search" else "target_size"] = "9"
        assert asked[0][1].options == wanted

    def test_main_is_transfer(self, asked: Asked) -> None:
        assert main(["main", "--seed", "3"]) == main(["transfer", "--seed", "3"]) == 0
        assert asked[0] == asked[1]

    def test_an_empty_value_is_one_not_given(self, asked: Asked) -> None:
        empty = "--source-size '' --source_limit '' --max-macs '' --stem '' --model-name '' "
        rest = "--data '' --parallel '' --fresh '' --verbose '' --train-epochs ''"
        assert main(shlex.split(f"transfer {empty} {rest}")) == main(["transfer"]) == 0
        assert asked[0] == asked[1]

    @pytest.mark.parametrize(
        ("options", "fresh"),
        [
            ("--fresh true", True),
            ("--fresh True", True),
            ("--fresh false", False),
            ("--fresh", True),
            ("--no-fresh", False),
            ("--fresh --verbose false", True),
            ("--fresh true --fresh false", False),
            ("", False),
        ],
    )
    def test_flags_as_mlflow_writes_them(self, asked: Asked, options: str, fresh: bool) -> None:
        assert main(shlex.split(f"search {options} --seed 4")) == 0
        ((settings, machine),) = asked
        assert isinstance(settings, SearchSettings)
        assert (machine.fresh, settings.seed) == (fresh, 4)

    def test_underscores_are_hyphens_but_not_in_values(self, asked: Asked) -> None:
        options = "--source_limit 7 --source_size=9 --data=/my_sets/all_of_them --source folder:a_b"
        assert main(shlex.split(f"search {options}")) == 0
        ((settings, machine),) = asked
        assert settings.source == DataSettings("folder:a_b", 9, 7, 14)
        assert machine.data == Path("/my_sets/all_of_them")

    def test_numbers_reach_their_places(self, asked: Asked) -> None:
        options = (
            "--search-epochs 20 --search-batch-size 32 --search-channels 12 --search-cells 5 "
            "--cells 6 --max-macs 1.5M --stem imagenet --train-epochs 9 --train-batch-size 16 "
            "--seeds 4 --seed 2 --workers 3 --parallel 5 --device cpu --method pcdarts "
            "--backend eager --storage bfloat16 --cuda-graphs auto"
        )
        assert main(shlex.split(f"transfer {options}")) == 0
        ((settings, machine),) = asked
        search = settings.search
        assert (search.epochs, search.batch_size) == (20, 32)
        assert (search.supernet.channels, search.supernet.cells) == (12, 5)
        assert search.warmup_epochs == 6  # the paper's 15 of 50
        stack = settings.stack
        assert (stack.channels, stack.cells, stack.max_macs, stack.stem) == (
            None, 6, 1_500_000, "imagenet",
        )  # fmt: skip
        compare = settings.compare
        assert (compare.training.epochs, compare.training.batch_size) == (9, 16)
        assert (compare.seeds, compare.seed) == (4, 2)
        assert replace(machine, options={}) == Machine(
            "cpu", 3, 5, 1, None, False, backend="eager", storage="bfloat16", cuda_graphs="auto"
        )

    def test_what_a_search_begins_with_and_ends_by(self, asked: Asked) -> None:
        command = "--warm-start supernet-digits/2 --alpha-temperature 2 --stop plateau,genotype"
        assert main(["search", *command.split(), "--contribute", "true"]) == 0
        assert main(["search", "--warm-start", "mnist5k", "--source-limit", "90"]) == 0
        assert main(["search"]) == 0
        first, second, plain = (settings for settings, _ in asked)
        assert first.warm == WarmSettings(
            "supernet-digits/2", None, WarmStartOptions(alpha_temperature=2.0)
        )
        assert first.config.stopping == Stopping(plateau_epochs=5, genotype_epochs=5)
        assert first.contribute
        assert second.warm.data == DataSettings("mnist5k", None, 90, 14)
        assert (plain.warm, plain.contribute, plain.config.stopping) == (None, False, Stopping())

    @pytest.mark.parametrize(
        "command", ["search --warm-start auto", "transfer --transfer supernet --source auto"]
    )
    def test_the_last_stages_alone(self, command: str, asked: Asked) -> None:
        stages = "--method pdarts --warm-what operations --warm-stages 2"
        assert main([*command.split(), *stages.split()]) == 0
        ((settings, _),) = asked
        assert settings.warm.options == WarmStartOptions(what="operations", stages=2)
        assert settings.method.name == "pdarts"

    @pytest.mark.parametrize("source", ["auto", "supernet-digits/3", "run:0123"])
    def test_a_transfer_by_supernet_begins_with_more_than_data(
        self, source: str, asked: Asked
    ) -> None:
        assert main(["transfer", "--transfer", "supernet", "--source", source]) == 0
        ((settings, _),) = asked
        assert settings.source is None
        assert (settings.warm.source, settings.warm.data) == (source, None)

    def test_sources_of_a_pretraining(self, asked: Asked) -> None:
        options = "--sources digits,mnist5k --each true --sampling uniform --source-size 9"
        assert main(["pretrain", *options.split()]) == 0
        ((settings, _),) = asked
        assert settings.sources == tuple(
            DataSettings(name, 9, None, 14) for name in ("digits", "mnist5k")
        )
        assert (settings.each, settings.sampling) == (True, "uniform")

    @pytest.mark.parametrize("epochs", [1, 2, 3, 50])
    def test_a_short_search_leaves_the_alphas_an_epoch(self, asked: Asked, epochs: int) -> None:
        assert main(shlex.split(f"search --method pcdarts --search-epochs {epochs}")) == 0
        assert asked[0][0].config.warmup_epochs < epochs

    def test_retrain_and_evaluate(self, asked: Asked) -> None:
        assert main(shlex.split("retrain --architecture run:12 --channels 6 --target mnist5k")) == 0
        assert main(shlex.split("evaluate --model models:/a@b --target digits")) == 0
        (retrain, _), (evaluate, _) = asked
        assert isinstance(retrain, RetrainSettings)
        assert (retrain.architecture, retrain.stack.channels) == ("run:12", 6)
        assert retrain.compare.model_name == "nas-mnist5k"
        assert evaluate == EvaluateSettings("models:/a@b", DataSettings("digits"))

    @pytest.mark.parametrize(
        ("target", "name"),
        [
            ("animals", "nas-animals"),
            ("folder:/data/pets", "nas-pets"),
            ("folder:/data/pets/", "nas-pets"),
            ("folder:pets", "nas-pets"),
            ("folder:.", "nas-here"),
            ("folder:/data/a:b", "nas-a-b"),
        ],
    )
    def test_a_model_is_named_after_its_target(
        self,
        asked: Asked,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        target: str,
        name: str,
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert main(["retrain", "--target", target]) == 0
        assert asked[0][0].compare.model_name == name

    def test_the_root_folder_has_no_name(self, asked: Asked) -> None:
        assert main(["retrain", "--target", "folder:/"]) == 0
        assert asked[0][0].compare.model_name == "nas-"


def test_a_registered_name_is_checked_where_it_is_made(asked: Asked) -> None:
    assert main(["transfer"]) == 0
    compare = asked[0][0].compare
    for name in ("", " ", "a/b", "a:b"):
        with pytest.raises(ConfigurationError, match="--model-name"):
            replace(compare, model_name=name)

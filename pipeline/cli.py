"""The command line: ``python -m pipeline ENTRY_POINT``. MLproject calls nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from nas.architecture import Skeleton
from nas.data.catalog import FOLDER_PREFIX
from nas.errors import NASError
from nas.ops.backend import AUTO
from nas.search import Method, SearchConfig, find_method
from nas.training import TrainConfig
from nas.transfer.cell import parse_macs
from nas.transfer.otdd import OTDDConfig
from pipeline import options as o
from pipeline.console import complain
from pipeline.distance import DistanceSettings, measure
from pipeline.evaluate import EvaluateSettings, evaluate
from pipeline.job import Machine
from pipeline.presets import Preset, find_preset
from pipeline.retrain import RetrainSettings, retrain
from pipeline.search import SearchSettings, search
from pipeline.settings import CompareSettings, DataSettings, StackSettings
from pipeline.transfer import TransferSettings, transfer

FAILED, INTERRUPTED = 1, 130  # 130 is what a shell reports for Ctrl-C
FLAGS = ("--fresh", "--verbose", "--debiased")

app = typer.Typer(
    help="Search an architecture on one data set, transfer it to another, train it, compare it "
    "with random networks, register it. Every run is tracked by MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command("main", hidden=True, help="The same as transfer.")
@app.command("transfer")
def transfer_command(
    context: typer.Context,
    source: o.Source = "digits",
    target: o.Target = "animals",
    method: o.MethodName = "darts",
    transfer_by: o.TransferName = "cell",
    preset: o.PresetName = "quick",
    seeds: o.Seeds = 3,
    seed: o.Seed = 0,
    source_size: o.SourceSize = None,
    source_limit: o.SourceLimit = None,
    target_size: o.TargetSize = None,
    target_limit: o.TargetLimit = None,
    search_epochs: o.SearchEpochs = None,
    search_batch_size: o.SearchBatchSize = None,
    search_channels: o.SearchChannels = None,
    search_cells: o.SearchCells = None,
    channels: o.Channels = None,
    cells: o.Cells = None,
    max_macs: o.MaxMacs = None,
    stem: o.Stem = None,
    train_epochs: o.TrainEpochs = None,
    train_batch_size: o.TrainBatchSize = None,
    model_name: o.ModelName = None,
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    workers: o.Workers = 0,
    parallel: o.Parallel = None,
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """The main job: search on the source, transfer to the target, train, compare, register.

    Ends with a table of the transferred network beside equally many random ones of the same
    space, trained by the same recipe, and with a version in the model registry.
    """
    scale, searcher = find_preset(preset), find_method(method)
    transfer(
        TransferSettings(
            transfer=transfer_by,
            source=DataSettings(source, source_size, source_limit, scale.largest),
            target=DataSettings(target, target_size, target_limit, scale.largest),
            method=searcher,
            search=_search_config(
                scale, searcher, search_epochs, search_batch_size, search_channels, search_cells
            ),
            stack=_stack(scale, channels, cells, max_macs, stem),
            compare=CompareSettings(
                training=_train_config(scale, train_epochs, train_batch_size),
                seeds=seeds,
                seed=seed,
                model_name=model_name or _model_name(target),
            ),
        ),
        Machine(device, workers, parallel, scale.threads, data, fresh, _options(context), backend),
    )


@app.command("search")
def search_command(
    context: typer.Context,
    source: o.Source = "digits",
    method: o.MethodName = "darts",
    preset: o.PresetName = "quick",
    seed: o.Seed = 0,
    source_size: o.SourceSize = None,
    source_limit: o.SourceLimit = None,
    search_epochs: o.SearchEpochs = None,
    search_batch_size: o.SearchBatchSize = None,
    search_channels: o.SearchChannels = None,
    search_cells: o.SearchCells = None,
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    workers: o.Workers = 0,
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """Search only: genotype, supernet and pictures of one search on one data set."""
    scale, searcher = find_preset(preset), find_method(method)
    config = _search_config(
        scale, searcher, search_epochs, search_batch_size, search_channels, search_cells
    )
    search(
        SearchSettings(
            DataSettings(source, source_size, source_limit, scale.largest), searcher, config, seed
        ),
        Machine(device, workers, None, scale.threads, data, fresh, _options(context), backend),
    )


@app.command("retrain")
def retrain_command(
    context: typer.Context,
    architecture: o.ArchitectureName = "DARTS_V2",
    target: o.Target = "animals",
    preset: o.PresetName = "quick",
    seeds: o.Seeds = 3,
    seed: o.Seed = 0,
    target_size: o.TargetSize = None,
    target_limit: o.TargetLimit = None,
    channels: o.Channels = None,
    cells: o.Cells = None,
    max_macs: o.MaxMacs = None,
    stem: o.Stem = None,
    train_epochs: o.TrainEpochs = None,
    train_batch_size: o.TrainBatchSize = None,
    model_name: o.ModelName = None,
    device: o.Device = "auto",
    workers: o.Workers = 0,
    parallel: o.Parallel = None,
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """Train a known architecture, compare it with random ones, and register it."""
    scale = find_preset(preset)
    retrain(
        RetrainSettings(
            architecture=architecture,
            target=DataSettings(target, target_size, target_limit, scale.largest),
            skeleton=Skeleton("cifar", scale.channels, scale.cells),
            stack=StackSettings(channels, cells, _limit(max_macs), stem),
            compare=CompareSettings(
                training=_train_config(scale, train_epochs, train_batch_size),
                seeds=seeds,
                seed=seed,
                model_name=model_name or _model_name(target),
            ),
        ),
        Machine(device, workers, parallel, scale.threads, data, fresh, _options(context)),
    )


@app.command("evaluate")
def evaluate_command(
    context: typer.Context,
    model: o.ModelUri = "nas-animals",
    target: o.Target = "animals",
    target_size: o.TargetSize = None,
    target_limit: o.TargetLimit = None,
    data: o.DataRoot = None,
    verbose: o.Verbose = False,
) -> None:
    """Test a registered model on the test split, as anyone would use it."""
    evaluate(
        EvaluateSettings(model, DataSettings(target, target_size, target_limit)),
        Machine(device="cpu", data=data, options=_options(context)),
    )


@app.command("distance")
def distance_command(
    context: typer.Context,
    datasets: o.Datasets = "digits,mnist5k,animals",
    limit: o.Limit = None,
    features: o.Features = "pca",
    label_distance: o.LabelDistance = "gaussian",
    outer: o.Outer = "exact",
    regularisation: o.Regularisation = 0.1,
    debiased: o.Debiased = True,
    points: o.Points = 2000,
    seed: o.PointsSeed = 0,
    device: o.Device = "auto",
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """How far data sets are from one another, by optimal transport (OTDD).

    The nearer a source, the more of what was learnt on it can be expected to help. Two labelled
    images differ by their features and by how the images of their two classes lie; the distance
    is the root of what it costs, squared and on average, to turn one set into the other. Ends with
    the matrix, a heat map and a map of the sets. Images of other sizes and grey ones are made
    alike first; test splits are not looked at.
    """
    names = [name.strip() for name in datasets.split(",") if name.strip()]
    measure(
        DistanceSettings(
            datasets=tuple(DataSettings(name, None, limit) for name in names),
            features=features,
            config=OTDDConfig(label_distance, outer, regularisation, debiased),
            points=points,
            seed=seed,
        ),
        Machine(device=device, data=data, fresh=fresh, options=_options(context)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one sentence on stderr."""
    arguments = _from_mlflow(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, prog_name="python -m pipeline", standalone_mode=True)
    except SystemExit as stop:  # Typer's way to end, after Ctrl-C too
        if stop.code == INTERRUPTED:
            complain("interrupted; start it again with the same options to go on")
        return stop.code if isinstance(stop.code, int) else FAILED
    except Exception as error:
        if "--verbose" in arguments:
            raise
        expected = isinstance(error, NASError)
        hint = "" if expected else f" ({type(error).__name__}; --verbose shows where)"
        complain(f"error: {error}{hint}")
        return FAILED
    return 0


def _from_mlflow(arguments: Sequence[str]) -> list[str]:
    """MLflow hands over every parameter as "--name value": an empty value is one that was not
    given, and a flag has none of its own."""
    kept: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        value = arguments[position + 1] if position + 1 < len(arguments) else None
        if argument.startswith("--") and value == "":
            position += 2
        elif argument in FLAGS and value is not None and value.lower() in ("true", "false"):
            kept.append(argument if value.lower() == "true" else f"--no-{argument[2:]}")
            position += 2
        else:
            kept.append(_with_hyphens(argument) if argument.startswith("--") else argument)
            position += 1
    return kept


def _options(context: typer.Context) -> dict[str, str]:
    """Every option as `mlflow run` logs it, so that runs compare however they were started."""
    options = {}
    for option in context.command.params:
        if option.name in context.params:
            value = context.params[option.name]
            text = "" if value is None else str(value)
            name = max(option.opts, key=len).removeprefix("--").replace("-", "_")
            options[name] = shlex.quote(text.lower() if isinstance(value, bool) else text)
    return options


def _with_hyphens(option: str) -> str:
    """ "--source_size=8" as "--source-size=8"; a value keeps its underscores."""
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


def _search_config(
    preset: Preset,
    method: Method,
    epochs: int | None,
    batch_size: int | None,
    channels: int | None,
    cells: int | None,
) -> SearchConfig:
    config = preset.search(method)
    if epochs is not None:
        # the share of epochs in which the alphas wait stays the paper's
        paper = method.paper_config()
        warmup = min(epochs - 1, round(epochs * paper.warmup_epochs / paper.epochs))
        config = replace(config, epochs=epochs, warmup_epochs=warmup)
    supernet = replace(config.supernet, **_given(channels=channels, cells=cells))
    return replace(config, supernet=supernet, **_given(batch_size=batch_size))


def _train_config(preset: Preset, epochs: int | None, batch_size: int | None) -> TrainConfig:
    return replace(preset.training, **_given(epochs=epochs, batch_size=batch_size))


def _stack(
    preset: Preset,
    channels: int | None,
    cells: int | None,
    max_macs: str | None,
    stem: str | None,
) -> StackSettings:
    limit = _limit(max_macs)
    if channels is None and limit is None:
        channels = preset.channels
    return StackSettings(channels, cells or preset.cells, limit, stem)


def _limit(max_macs: str | None) -> int | None:
    return None if max_macs is None else parse_macs(max_macs)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _model_name(target: str) -> str:
    """A name the registry takes: "folder:/data/pets" gives "nas-pets"."""
    if not target.startswith(FOLDER_PREFIX):
        return f"nas-{target}"
    folder = Path(target.removeprefix(FOLDER_PREFIX)).expanduser().resolve()
    return f"nas-{folder.name.replace(':', '-')}"

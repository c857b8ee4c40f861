"""The command line: ``python -m pipeline ENTRY_POINT``. MLproject calls nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from nas.architecture import Skeleton
from nas.errors import NASError
from nas.ops.backend import AUTO, FLOAT32
from nas.search import find_method
from nas.search.replay import OFF
from nas.search.sources import SQUARE_ROOT
from nas.transfer.otdd import OTDDConfig
from nas.transfer.supernet import BOTH
from pipeline import options as o
from pipeline.asked import (
    default_model_name,
    is_data_set,
    macs_limit,
    require_no_supernet,
    search_config,
    split_names,
    stack,
    train_config,
    warm_settings,
)
from pipeline.console import complain
from pipeline.distance import DistanceSettings, measure
from pipeline.evaluate import EvaluateSettings, evaluate
from pipeline.job import Machine
from pipeline.presets import find_preset
from pipeline.pretrain import PretrainSettings, pretrain
from pipeline.retrain import RetrainSettings, retrain
from pipeline.search import SearchSettings, search
from pipeline.settings import CompareSettings, DataSettings, StackSettings
from pipeline.study import StudySettings, study
from pipeline.transfer import TransferSettings, transfer

FAILED, INTERRUPTED = 1, 130  # 130 is what a shell reports for Ctrl-C
FLAGS = ("--fresh", "--verbose", "--each", "--contribute", "--debiased")

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
    source: o.TransferSource = "digits",
    target: o.Target = "animals",
    method: o.MethodName = "darts",
    transfer_by: o.TransferName = "cell",
    warm_what: o.WarmWhat = BOTH,
    alpha_temperature: o.AlphaTemperature = 1.0,
    learning_rate_scale: o.LearningRateScale = 1.0,
    warm_stages: o.WarmStages = 0,
    contribute: o.Contribute = False,
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
    stop: o.Stop = "",
    channels: o.Channels = None,
    cells: o.Cells = None,
    max_macs: o.MaxMacs = None,
    stem: o.Stem = None,
    train_epochs: o.TrainEpochs = None,
    train_batch_size: o.TrainBatchSize = None,
    model_name: o.ModelName = None,
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    storage: o.Storage = FLOAT32,
    cuda_graphs: o.CudaGraphs = OFF,
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
    data_set = None
    if transfer_by != "supernet" or is_data_set(source):
        require_no_supernet(source)
        data_set = DataSettings(source, source_size, source_limit, scale.largest)
    transfer(
        TransferSettings(
            transfer=transfer_by,
            source=data_set,
            target=DataSettings(target, target_size, target_limit, scale.largest),
            method=searcher,
            search=search_config(
                scale,
                searcher,
                search_epochs,
                search_batch_size,
                search_channels,
                search_cells,
                stop,
            ),
            stack=stack(scale, channels, cells, max_macs, stem),
            compare=CompareSettings(
                training=train_config(scale, train_epochs, train_batch_size),
                least_steps=0 if train_epochs else scale.least_steps,
                seeds=seeds,
                seed=seed,
                model_name=model_name or default_model_name(target),
            ),
            warm=warm_settings(
                source, data_set, warm_what, alpha_temperature, learning_rate_scale, warm_stages
            ),
            contribute=contribute,
        ),
        Machine(
            device,
            workers,
            parallel,
            scale.threads,
            data,
            fresh,
            _options(context),
            backend,
            storage,
            cuda_graphs,
        ),
    )


@app.command("search")
def search_command(
    context: typer.Context,
    source: o.Source = "digits",
    method: o.MethodName = "darts",
    warm_start: o.WarmStartName = "",
    warm_what: o.WarmWhat = BOTH,
    alpha_temperature: o.AlphaTemperature = 1.0,
    learning_rate_scale: o.LearningRateScale = 1.0,
    warm_stages: o.WarmStages = 0,
    contribute: o.Contribute = False,
    preset: o.PresetName = "quick",
    seed: o.Seed = 0,
    source_size: o.SourceSize = None,
    source_limit: o.SourceLimit = None,
    search_epochs: o.SearchEpochs = None,
    search_batch_size: o.SearchBatchSize = None,
    search_channels: o.SearchChannels = None,
    search_cells: o.SearchCells = None,
    stop: o.Stop = "",
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    storage: o.Storage = FLOAT32,
    cuda_graphs: o.CudaGraphs = OFF,
    workers: o.Workers = 0,
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """Search only: genotype, supernet and pictures of one search on one data set."""
    scale, searcher = find_preset(preset), find_method(method)
    config = search_config(
        scale, searcher, search_epochs, search_batch_size, search_channels, search_cells, stop
    )
    warm = None
    if warm_start:
        data_set = (
            DataSettings(warm_start, source_size, source_limit, scale.largest)
            if is_data_set(warm_start)
            else None
        )
        warm = warm_settings(
            warm_start, data_set, warm_what, alpha_temperature, learning_rate_scale, warm_stages
        )
    asked = DataSettings(source, source_size, source_limit, scale.largest)
    search(
        SearchSettings(asked, searcher, config, seed, warm, contribute),
        Machine(
            device,
            workers,
            None,
            scale.threads,
            data,
            fresh,
            _options(context),
            backend,
            storage,
            cuda_graphs,
        ),
    )


@app.command("pretrain")
def pretrain_command(
    context: typer.Context,
    sources: o.Sources = "digits",
    each: o.Each = False,
    sampling: o.Sampling = SQUARE_ROOT,
    method: o.MethodName = "darts",
    preset: o.PresetName = "quick",
    seed: o.Seed = 0,
    source_size: o.SourceSize = None,
    source_limit: o.SourceLimit = None,
    search_epochs: o.SearchEpochs = None,
    search_batch_size: o.SearchBatchSize = None,
    search_channels: o.SearchChannels = None,
    search_cells: o.SearchCells = None,
    stop: o.Stop = "",
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    storage: o.Storage = FLOAT32,
    cuda_graphs: o.CudaGraphs = OFF,
    workers: o.Workers = 0,
    data: o.DataRoot = None,
    fresh: o.Fresh = False,
    verbose: o.Verbose = False,
) -> None:
    """Search supernets and register them, for other searches to begin with.

    Several sources share one supernet with a head each. A later `transfer --transfer supernet
    --source auto` takes the registered supernet that is nearest to its target.
    """
    scale, searcher = find_preset(preset), find_method(method)
    pretrain(
        PretrainSettings(
            sources=tuple(
                DataSettings(name, source_size, source_limit, scale.largest)
                for name in split_names(sources)
            ),
            method=searcher,
            config=search_config(
                scale,
                searcher,
                search_epochs,
                search_batch_size,
                search_channels,
                search_cells,
                stop,
            ),
            seed=seed,
            sampling=sampling,
            each=each,
        ),
        Machine(
            device,
            workers,
            None,
            scale.threads,
            data,
            fresh,
            _options(context),
            backend,
            storage,
            cuda_graphs,
        ),
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
            stack=StackSettings(channels, cells, macs_limit(max_macs), stem),
            compare=CompareSettings(
                training=train_config(scale, train_epochs, train_batch_size),
                least_steps=0 if train_epochs else scale.least_steps,
                seeds=seeds,
                seed=seed,
                model_name=model_name or default_model_name(target),
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


@app.command("study")
def study_command(
    context: typer.Context,
    preset: o.StudyName = "warm-start",
    results: o.Results = Path("studies/warm-start/results.csv"),
    seeds: o.Repetitions = 3,
    at_most: o.AtMost = None,
    device: o.Device = "auto",
    backend: o.Backend = AUTO,
    data: o.StudyData = None,
    verbose: o.Verbose = False,
) -> None:
    """Run an experiment of many searches, a row of a CSV file each, and report what it shows.

    What is done is not done again: a study that was stopped goes on when it is started anew, and
    with more seeds it grows. The report and its pictures are written beside the file.
    """
    study(
        StudySettings(preset, results, seeds, at_most),
        Machine(device, threads=1, data=data, options=_options(context), backend=backend),
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

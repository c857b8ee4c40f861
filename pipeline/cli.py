"""The command line: ``python -m pipeline ENTRY_POINT``. MLproject calls nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from nas.architecture import Skeleton
from nas.errors import NASError
from nas.ops.backend import AUTO
from nas.search.sources import SQUARE_ROOT
from nas.transfer.otdd import OTDDConfig
from pipeline import options as o
from pipeline.asked import is_data_set, require_no_supernet, split_names
from pipeline.console import complain
from pipeline.distance import DistanceSettings, measure
from pipeline.evaluate import EvaluateSettings, evaluate
from pipeline.groups import (
    CompareOptions,
    KernelOptions,
    MachineOptions,
    NetworkOptions,
    SearchOptions,
    SourceOptions,
    TargetOptions,
    WarmOptions,
    expanded,
)
from pipeline.job import Machine
from pipeline.presets import find_preset
from pipeline.pretrain import PretrainSettings, pretrain
from pipeline.retrain import RetrainSettings, retrain
from pipeline.search import SearchSettings, search
from pipeline.settings import DataSettings
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
@expanded
def transfer_command(
    context: typer.Context,
    images: SourceOptions,
    target_images: TargetOptions,
    searching: SearchOptions,
    warm: WarmOptions,
    network: NetworkOptions,
    comparing: CompareOptions,
    kernels: KernelOptions,
    machine: MachineOptions,
    source: o.TransferSource = "digits",
    target: o.Target = "animals",
    transfer_by: o.TransferName = "cell",
    preset: o.PresetName = "quick",
) -> None:
    """The main job: search on the source, transfer to the target, train, compare, register.

    Ends with a table of the transferred network beside equally many random ones of the same
    space, trained by the same recipe, and with a version in the model registry.
    """
    scale = find_preset(preset)
    searched = transfer_by != "supernet" or is_data_set(source)
    if searched:
        require_no_supernet(source)
    transfer(
        TransferSettings(
            transfer=transfer_by,
            source=images.data(source, scale) if searched else None,
            target=target_images.data(target, scale),
            method=searching.searcher,
            search=searching.config(scale),
            stack=network.stack(scale),
            compare=comparing.settings(scale, target),
            warm=warm.settings(source, images, scale),
            contribute=warm.contribute,
        ),
        machine.machine(_options(context), scale, kernels, comparing.parallel),
    )


@app.command("search")
@expanded
def search_command(
    context: typer.Context,
    images: SourceOptions,
    searching: SearchOptions,
    warm: WarmOptions,
    kernels: KernelOptions,
    machine: MachineOptions,
    source: o.Source = "digits",
    warm_start: o.WarmStartName = "",
    preset: o.PresetName = "quick",
    seed: o.Seed = 0,
) -> None:
    """Search only: genotype, supernet and pictures of one search on one data set."""
    scale = find_preset(preset)
    search(
        SearchSettings(
            images.data(source, scale),
            searching.searcher,
            searching.config(scale),
            seed,
            warm.settings(warm_start, images, scale) if warm_start else None,
            warm.contribute,
        ),
        machine.machine(_options(context), scale, kernels),
    )


@app.command("pretrain")
@expanded
def pretrain_command(
    context: typer.Context,
    images: SourceOptions,
    searching: SearchOptions,
    kernels: KernelOptions,
    machine: MachineOptions,
    sources: o.Sources = "digits",
    each: o.Each = False,
    sampling: o.Sampling = SQUARE_ROOT,
    preset: o.PresetName = "quick",
    seed: o.Seed = 0,
) -> None:
    """Search supernets and register them, for other searches to begin with.

    Several sources share one supernet with a head each. A later `transfer --transfer supernet
    --source auto` takes the registered supernet that is nearest to its target.
    """
    scale = find_preset(preset)
    pretrain(
        PretrainSettings(
            sources=tuple(images.data(name, scale) for name in split_names(sources)),
            method=searching.searcher,
            config=searching.config(scale),
            seed=seed,
            sampling=sampling,
            each=each,
        ),
        machine.machine(_options(context), scale, kernels),
    )


@app.command("retrain")
@expanded
def retrain_command(
    context: typer.Context,
    target_images: TargetOptions,
    network: NetworkOptions,
    comparing: CompareOptions,
    machine: MachineOptions,
    architecture: o.ArchitectureName = "DARTS_V2",
    target: o.Target = "animals",
    preset: o.PresetName = "quick",
) -> None:
    """Train a known architecture, compare it with random ones, and register it."""
    scale = find_preset(preset)
    retrain(
        RetrainSettings(
            architecture=architecture,
            target=target_images.data(target, scale),
            skeleton=Skeleton("cifar", scale.channels, scale.cells),
            stack=network.given(),
            compare=comparing.settings(scale, target),
        ),
        machine.machine(_options(context), scale, parallel=comparing.parallel),
    )


@app.command("evaluate")
@expanded
def evaluate_command(
    context: typer.Context,
    target_images: TargetOptions,
    model: o.ModelUri = "nas-animals",
    target: o.Target = "animals",
    data: o.DataRoot = None,
    verbose: o.Verbose = False,
) -> None:
    """Test a registered model on the test split, as anyone would use it."""
    evaluate(
        EvaluateSettings(model, target_images.data(target)),
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
    measure(
        DistanceSettings(
            datasets=tuple(DataSettings(name, None, limit) for name in split_names(datasets)),
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

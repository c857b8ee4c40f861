"""The command line's options, each described once and shared by the entry points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.data import DATA_SETS
from nas.search import METHODS
from nas.spaces.darts import PUBLISHED
from nas.transfer.otdd.distance import OUTER
from pipeline.distance import FEATURES
from pipeline.presets import PRESETS
from pipeline.study import STUDIES

_SETS = ", ".join(name for name in DATA_SETS if not name.startswith("folder:"))
_METHODS = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
_FEATURES = "; ".join(f"{name}: {summary}" for name, summary in FEATURES.items())
_OUTER = "; ".join(f"{name}: {summary}" for name, summary in OUTER.items())
_STUDIES = "; ".join(f"{name}: {study.summary}" for name, study in STUDIES.items())
_PRESETS = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())

STUDY, DATA, SEARCH, MEASURE, NETWORK, TRAINING, MACHINE = (
    "The study",
    "What data",
    "How to search",
    "How to measure",
    "The final network",
    "How to train and compare",
    "The machine",
)

Source = Annotated[
    str,
    typer.Option(
        help=f"Data set to search on: {_SETS}, or folder:PATH (one folder a class, optional "
        "train/val/test).",
        rich_help_panel=DATA,
    ),
]
TransferSource = Annotated[
    str,
    typer.Option(
        "--source",
        help=f"Data set to search on: {_SETS}, or folder:PATH (one folder a class, optional "
        "train/val/test). With --transfer supernet also what to begin with: auto takes the nearest "
        "registered supernet, a name such as supernet-digits or supernet-digits/3 that one, "
        "run:ID that of a search.",
        rich_help_panel=DATA,
    ),
]
Sources = Annotated[
    str,
    typer.Option(
        help="Data sets to search on, separated by commas and named like --source of transfer: one "
        "supernet for all of them, with a head each.",
        rich_help_panel=DATA,
    ),
]
Each = Annotated[
    bool,
    typer.Option(
        "--each/--no-each",
        help="Of several sources, register a supernet of each alone as well.",
        rich_help_panel=DATA,
    ),
]
Sampling = Annotated[
    str,
    typer.Option(
        help="How a step chooses among several sources. sqrt: by the root of their sizes; uniform: "
        "all alike.",
        rich_help_panel=SEARCH,
    ),
]
WarmStartName = Annotated[
    str,
    typer.Option(
        "--warm-start",
        help="Supernet to begin with instead of a fresh one. auto: the nearest registered one; "
        "supernet-digits or supernet-digits/3: that one; run:ID: that of a search; a data set: it "
        "is searched first.",
        rich_help_panel=SEARCH,
    ),
]
WarmWhat = Annotated[
    str,
    typer.Option(
        help="What the search takes over from the other supernet: weights, alphas or both; with "
        "--warm-stages also operations: its operation sets alone.",
        rich_help_panel=SEARCH,
    ),
]
AlphaTemperature = Annotated[
    float,
    typer.Option(
        help="Divides the alphas that are taken over; above 1 they stay more adaptable.",
        rich_help_panel=SEARCH,
    ),
]
LearningRateScale = Annotated[
    float,
    typer.Option(
        help="Multiplies the learning rate of weights that were taken over.",
        rich_help_panel=SEARCH,
    ),
]
WarmStages = Annotated[
    int,
    typer.Option(
        min=0,
        help="Of --method pdarts run only the last so many stages, on the operations that the "
        "other supernet had left at their start; 0 runs all stages.",
        rich_help_panel=SEARCH,
    ),
]
Contribute = Annotated[
    bool,
    typer.Option(
        "--contribute/--no-contribute",
        help="Register the supernet of the search, so that later searches can begin with it.",
        rich_help_panel=SEARCH,
    ),
]
Stop = Annotated[
    str,
    typer.Option(
        help="End the search early, by rules separated by commas. plateau: the supernet's accuracy "
        "has not risen by 0.1% for 5 epochs; genotype: the cells have not changed for 5 epochs; "
        "skips: the normal cell has more than 2 skip connections.",
        rich_help_panel=SEARCH,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        help="Data set that the network is for; named like --source.", rich_help_panel=DATA
    ),
]
_SIZE = "Scale the images to this many pixels a side; by default the set's own size."
_LIMIT = "Use at most this many images, chosen evenly from the classes."
SourceSize = Annotated[int | None, typer.Option("--source-size", help=_SIZE, rich_help_panel=DATA)]
TargetSize = Annotated[int | None, typer.Option("--target-size", help=_SIZE, rich_help_panel=DATA)]
SourceLimit = Annotated[
    int | None, typer.Option("--source-limit", min=1, help=_LIMIT, rich_help_panel=DATA)
]
TargetLimit = Annotated[
    int | None, typer.Option("--target-limit", min=1, help=_LIMIT, rich_help_panel=DATA)
]
Datasets = Annotated[
    str,
    typer.Option(
        help=f"Data sets to compare, with commas between them: {_SETS}, or folder:PATH.",
        rich_help_panel=DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use at most this many images of each set, chosen evenly from the classes.",
        rich_help_panel=DATA,
    ),
]
Features = Annotated[
    str,
    typer.Option(
        help="What images are compared by; distances can be compared within one kind only. "
        f"{_FEATURES}.",
        rich_help_panel=MEASURE,
    ),
]
LabelDistance = Annotated[
    str,
    typer.Option(
        help="Distance between classes. gaussian: Bures-Wasserstein, by means and covariances; "
        "diagonal: without correlations; means: by means alone; exact: between their images.",
        rich_help_panel=MEASURE,
    ),
]
Outer = Annotated[
    str,
    typer.Option(
        help=f"How images are matched. {_OUTER}; it takes --label-distance diagonal or means.",
        rich_help_panel=MEASURE,
    ),
]
Regularisation = Annotated[
    float,
    typer.Option(
        help="Of --outer entropic, as a share of the mean cost of a match.",
        rich_help_panel=MEASURE,
    ),
]
Debiased = Annotated[
    bool,
    typer.Option(
        "--debiased/--no-debiased",
        help="With --outer entropic: take off what either set costs against itself.",
        rich_help_panel=MEASURE,
    ),
]
Points = Annotated[
    int,
    typer.Option(
        min=2,
        help="Images of each set that are matched; statistics of classes are of up to 20,000.",
        rich_help_panel=MEASURE,
    ),
]
PointsSeed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, help="Decides which images are matched.", rich_help_panel=MEASURE
    ),
]
TransferName = Annotated[
    str,
    typer.Option(
        "--transfer",
        help="What moves from source to target. cell: the cells, stacked anew (NASTransfer); "
        "supernet: weights and alphas of a supernet, which a search on the target goes on from.",
        rich_help_panel=SEARCH,
    ),
]
MethodName = Annotated[str, typer.Option("--method", help=f"{_METHODS}.", rich_help_panel=SEARCH)]
PresetName = Annotated[str, typer.Option("--preset", help=f"Scale of the whole job. {_PRESETS}.")]
SearchEpochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Epochs of the search instead of the preset's; of --method pdarts, of each stage.",
        rich_help_panel=SEARCH,
    ),
]
SearchBatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images in a batch of either half.", rich_help_panel=SEARCH),
]
SearchChannels = Annotated[
    int | None,
    typer.Option(min=1, help="Initial channels of the supernet.", rich_help_panel=SEARCH),
]
SearchCells = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Cells of the supernet; of --method pdarts, of that of the first stage.",
        rich_help_panel=SEARCH,
    ),
]
ArchitectureName = Annotated[
    str,
    typer.Option(
        "--architecture",
        help=f"What to train: {', '.join(PUBLISHED)}, the file of a genotype or architecture, or "
        "run:ID of a search.",
        rich_help_panel=NETWORK,
    ),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Initial channels of the final network, an even number.",
        rich_help_panel=NETWORK,
    ),
]
Cells = Annotated[
    int | None, typer.Option(min=1, help="Cells of the final network.", rich_help_panel=NETWORK)
]
MaxMacs = Annotated[
    str | None,
    typer.Option(
        help="Instead of --channels: the widest network within this many multiply-adds an image, "
        "e.g. 600M.",
        rich_help_panel=NETWORK,
    ),
]
Stem = Annotated[
    str | None,
    typer.Option(
        help="cifar keeps the resolution, imagenet divides it by 8; by default imagenet from 128 "
        "pixels.",
        rich_help_panel=NETWORK,
    ),
]
TrainEpochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Epochs of each training instead of the preset's; `quick` has more on small sets.",
        rich_help_panel=TRAINING,
    ),
]
TrainBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images in a training batch.", rich_help_panel=TRAINING)
]
Seeds = Annotated[
    int,
    typer.Option(
        min=1,
        help="Trainings of the transferred network, and as many random networks beside it.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="First seed; the result is a function of it.", rich_help_panel=TRAINING
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model-name",
        help="Name in the model registry; by default nas-TARGET.",
        rich_help_panel=TRAINING,
    ),
]
ModelUri = Annotated[
    str,
    typer.Option(
        "--model",
        help="Registered model: NAME (its champion), models:/NAME@ALIAS or models:/NAME/1.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto takes a GPU where there is one; cpu, cuda, cuda:1.", rich_help_panel=MACHINE
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="Kernels of the search. native: C++, faster; eager: PyTorch alone; auto: native where "
        "they can be had. They differ in rounding alone, which may lead a search to other cells.",
        rich_help_panel=MACHINE,
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        help="How a search keeps images between the cells of its supernet. bfloat16 takes less "
        "time and memory than float32 and rounds more, which may lead the search to other cells.",
        rich_help_panel=MACHINE,
    ),
]
CudaGraphs = Annotated[
    str,
    typer.Option(
        help="auto: capture the steps of a search as CUDA graphs and replay them, which spares "
        "their thousands of launches, where they run in native kernels on a GPU and --method has "
        "the same step every time; says whether it does. off: run every step as it is. The result "
        "is the same.",
        rich_help_panel=MACHINE,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        min=0,
        help="Processes that decode images of sets too large for memory.",
        rich_help_panel=MACHINE,
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Networks trained side by side; by default one a core, and one at a time on a GPU.",
        rich_help_panel=MACHINE,
    ),
]
StudyName = Annotated[
    str, typer.Option("--preset", help=f"Which study. {_STUDIES}.", rich_help_panel=STUDY)
]
Results = Annotated[
    Path,
    typer.Option(
        help="CSV file that grows by a row for each search; the report is written beside it.",
        rich_help_panel=STUDY,
    ),
]
Repetitions = Annotated[
    int,
    typer.Option("--seeds", min=1, help="Repetitions of everything.", rich_help_panel=STUDY),
]
AtMost = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Run at most so many searches this time; 0 only writes the report anew.",
        rich_help_panel=STUDY,
    ),
]
StudyData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of the archives of images that the study needs; by default in the user's "
        "cache.",
        rich_help_panel=MACHINE,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of public data sets; by default in the user's cache.",
        rich_help_panel=MACHINE,
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh/--no-fresh",
        help="Run every step anew: reuse nothing, go on with nothing.",
        rich_help_panel=MACHINE,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose/--no-verbose", help="Show tracebacks.", rich_help_panel=MACHINE),
]

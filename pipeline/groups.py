"""Groups of options that entry points share, and the settings that each group makes.

A command takes a group as one parameter; :func:`expanded` gives it an option for each field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

from nas.ops.backend import AUTO, FLOAT32
from nas.search import Method, SearchConfig, find_method
from nas.search.replay import OFF
from nas.transfer.cell import parse_macs
from nas.transfer.supernet import BOTH, WarmStartOptions
from pipeline import options as o
from pipeline.asked import default_model_name, given, is_data_set, stopping
from pipeline.job import Machine
from pipeline.presets import Preset
from pipeline.settings import CompareSettings, DataSettings, StackSettings
from pipeline.warm import WarmSettings


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of its parameters that are groups.

    They come after its own. Typer reads options from the signature; the command gets whole groups.
    """
    hints = get_type_hints(command, include_extras=True)
    del hints["return"]
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        own = get_type_hints(group, include_extras=True)
        options += [
            inspect.Parameter(
                field.name, options[0].kind, default=field.default, annotation=own[field.name]
            )
            for field in fields(group)
        ]

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__doc__ = command.__doc__
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class SourceOptions:
    """How much of the data to search on."""

    source_size: o.SourceSize = None
    source_limit: o.SourceLimit = None

    def data(self, name: str, preset: Preset) -> DataSettings:
        """The set ``name``."""
        return DataSettings(name, self.source_size, self.source_limit, preset.largest)


@dataclass(frozen=True)
class TargetOptions:
    """How much of the data that the network is for."""

    target_size: o.TargetSize = None
    target_limit: o.TargetLimit = None

    def data(self, name: str, preset: Preset | None = None) -> DataSettings:
        """The set ``name``; without a preset in its own size."""
        largest = preset.largest if preset else None
        return DataSettings(name, self.target_size, self.target_limit, largest)


@dataclass(frozen=True)
class SearchOptions:
    """A method, and its numbers where they are not the preset's."""

    method: o.MethodName = "darts"
    search_epochs: o.SearchEpochs = None
    search_batch_size: o.SearchBatchSize = None
    search_channels: o.SearchChannels = None
    search_cells: o.SearchCells = None
    stop: o.Stop = ""

    @property
    def searcher(self) -> Method:
        """The method."""
        return find_method(self.method)

    def config(self, preset: Preset) -> SearchConfig:
        """The preset's search with what was given in the place of its numbers."""
        method = self.searcher
        config = replace(preset.search(method), stopping=stopping(self.stop))
        if self.search_epochs is not None:
            # the share of epochs in which the alphas wait stays the paper's
            epochs, paper = self.search_epochs, method.paper_config()
            warmup = min(epochs - 1, round(epochs * paper.warmup_epochs / paper.epochs))
            config = replace(config, epochs=epochs, warmup_epochs=warmup)
        size = given(channels=self.search_channels, cells=self.search_cells)
        return replace(
            config,
            supernet=replace(config.supernet, **size),
            **given(batch_size=self.search_batch_size),
        )


@dataclass(frozen=True)
class WarmOptions:
    """What a search takes over from another supernet, and whether it leaves its own to others."""

    warm_what: o.WarmWhat = BOTH
    alpha_temperature: o.AlphaTemperature = 1.0
    learning_rate_scale: o.LearningRateScale = 1.0
    warm_stages: o.WarmStages = 0
    contribute: o.Contribute = False

    def settings(self, source: str, images: SourceOptions, preset: Preset) -> WarmSettings:
        """To begin with ``source``: a data set, or what tells a supernet."""
        return WarmSettings(
            source,
            images.data(source, preset) if is_data_set(source) else None,
            WarmStartOptions(
                self.warm_what, self.alpha_temperature, self.learning_rate_scale, self.warm_stages
            ),
        )


@dataclass(frozen=True)
class NetworkOptions:
    """The skeleton of the final network."""

    channels: o.Channels = None
    cells: o.Cells = None
    max_macs: o.MaxMacs = None
    stem: o.Stem = None

    def given(self) -> StackSettings:
        """What was given, and nothing else."""
        limit = None if self.max_macs is None else parse_macs(self.max_macs)
        return StackSettings(self.channels, self.cells, limit, self.stem)

    def stack(self, preset: Preset) -> StackSettings:
        """The same with the preset's numbers where nothing was given."""
        own = self.given()
        sized = own.channels is not None or own.max_macs is not None
        return replace(
            own,
            channels=own.channels if sized else preset.channels,
            cells=own.cells or preset.cells,
        )


@dataclass(frozen=True)
class CompareOptions:
    """How to train the final network and its random rivals."""

    seeds: o.Seeds = 3
    seed: o.Seed = 0
    train_epochs: o.TrainEpochs = None
    train_batch_size: o.TrainBatchSize = None
    model_name: o.ModelName = None
    parallel: o.Parallel = None

    def settings(self, preset: Preset, target: str) -> CompareSettings:
        """The preset's recipe with what was given in the place of its numbers."""
        numbers = given(epochs=self.train_epochs, batch_size=self.train_batch_size)
        return CompareSettings(
            training=replace(preset.training, **numbers),
            least_steps=0 if self.train_epochs else preset.least_steps,
            seeds=self.seeds,
            seed=self.seed,
            model_name=self.model_name or default_model_name(target),
        )


@dataclass(frozen=True)
class KernelOptions:
    """What computes a search."""

    backend: o.Backend = AUTO
    storage: o.Storage = FLOAT32
    cuda_graphs: o.CudaGraphs = OFF


@dataclass(frozen=True)
class MachineOptions:
    """Where a job runs."""

    device: o.Device = "auto"
    workers: o.Workers = 0
    data: o.DataRoot = None
    fresh: o.Fresh = False
    verbose: o.Verbose = False  # looked at where errors are shown, pipeline/cli.py

    def machine(
        self,
        options: Mapping[str, str],
        preset: Preset,
        kernels: KernelOptions | None = None,
        parallel: int | None = None,
    ) -> Machine:
        """The machine, with the command line's ``options`` for the run to log."""
        kernels = kernels or KernelOptions()
        return Machine(
            device=self.device,
            workers=self.workers,
            parallel=parallel,
            threads=preset.threads,
            data=self.data,
            fresh=self.fresh,
            options=options,
            backend=kernels.backend,
            storage=kernels.storage,
            cuda_graphs=kernels.cuda_graphs,
        )

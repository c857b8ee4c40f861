"""From the options of the command line to settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.data import DATA_SETS
from nas.data.catalog import FOLDER_PREFIX
from nas.errors import ConfigurationError, UnknownNameError
from nas.search import Method, SearchConfig
from nas.search.stopping import RULES, Stopping
from nas.training import TrainConfig
from nas.transfer.cell import parse_macs
from nas.transfer.supernet import WarmStartOptions
from pipeline.presets import Preset
from pipeline.settings import DataSettings, StackSettings
from pipeline.specification import RUN
from pipeline.warm import AUTO, WarmSettings
from pipeline.zoo import PREFIX


def search_config(
    preset: Preset,
    method: Method,
    epochs: int | None,
    batch_size: int | None,
    channels: int | None,
    cells: int | None,
    stop: str,
) -> SearchConfig:
    """The preset's search with what was given in the place of its numbers."""
    config = replace(preset.search(method), stopping=stopping(stop))
    if epochs is not None:
        # the share of epochs in which the alphas wait stays the paper's
        paper = method.paper_config()
        warmup = min(epochs - 1, round(epochs * paper.warmup_epochs / paper.epochs))
        config = replace(config, epochs=epochs, warmup_epochs=warmup)
    supernet = replace(config.supernet, **given(channels=channels, cells=cells))
    return replace(config, supernet=supernet, **given(batch_size=batch_size))


def stopping(names: str) -> Stopping:
    """The rules called ``names``, separated by commas.

    Raises:
        UnknownNameError: there is no such rule.
    """
    rules = Stopping()
    for name in split_names(names):
        if name not in RULES:
            raise UnknownNameError("rule to stop by", name, RULES)
        default = Stopping()
        own = {k: v for k, v in vars(RULES[name]).items() if v != getattr(default, k)}
        rules = replace(rules, **own)
    return rules


def split_names(text: str) -> list[str]:
    """ "a, b" as its two names."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def is_data_set(name: str) -> bool:
    """Whether ``name`` is one that the catalog can read."""
    return name.startswith(FOLDER_PREFIX) or name in DATA_SETS


def require_no_supernet(source: str) -> None:
    """Return unless ``source`` names what only a transfer by supernet can begin with.

    Raises:
        ConfigurationError: it does.
    """
    if source == AUTO or source.startswith((RUN, PREFIX)):
        raise ConfigurationError(
            f"'{source}' is a supernet to begin with: add --transfer supernet, or name a data set "
            "to search on"
        )


def warm_settings(
    source: str,
    data: DataSettings | None,
    what: str,
    alpha_temperature: float,
    learning_rate_scale: float,
    stages: int,
) -> WarmSettings:
    """What a search shall begin with."""
    return WarmSettings(
        source, data, WarmStartOptions(what, alpha_temperature, learning_rate_scale, stages)
    )


def train_config(preset: Preset, epochs: int | None, batch_size: int | None) -> TrainConfig:
    """The preset's recipe with what was given in the place of its numbers."""
    return replace(preset.training, **given(epochs=epochs, batch_size=batch_size))


def stack(
    preset: Preset,
    channels: int | None,
    cells: int | None,
    max_macs: str | None,
    stem: str | None,
) -> StackSettings:
    """The skeleton of the final network, the preset's where nothing else was given."""
    limit = macs_limit(max_macs)
    if channels is None and limit is None:
        channels = preset.channels
    return StackSettings(channels, cells or preset.cells, limit, stem)


def macs_limit(max_macs: str | None) -> int | None:
    """The limit in multiply-adds, where one was given."""
    return None if max_macs is None else parse_macs(max_macs)


def given(**values: Any) -> dict[str, Any]:
    """Only the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def default_model_name(target: str) -> str:
    """A name the registry takes: "folder:/data/pets" gives "nas-pets"."""
    if not target.startswith(FOLDER_PREFIX):
        return f"nas-{target}"
    folder = Path(target.removeprefix(FOLDER_PREFIX)).expanduser().resolve()
    return f"nas-{folder.name.replace(':', '-')}"

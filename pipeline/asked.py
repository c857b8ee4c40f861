"""What words of the command line mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.data import DATA_SETS
from nas.data.catalog import FOLDER_PREFIX
from nas.errors import ConfigurationError, UnknownNameError
from nas.search.stopping import RULES, Stopping
from pipeline.specification import RUN
from pipeline.warm import AUTO
from pipeline.zoo import PREFIX


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


def given(**values: Any) -> dict[str, Any]:
    """Only the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def default_model_name(target: str) -> str:
    """A name the registry takes: "folder:/data/pets" gives "nas-pets"."""
    if not target.startswith(FOLDER_PREFIX):
        return f"nas-{target}"
    folder = Path(target.removeprefix(FOLDER_PREFIX)).expanduser().resolve()
    return f"nas-{folder.name.replace(':', '-')}"

"""The zoo: supernets in the model registry, and the one that a search begins with."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from nas.data.catalog import FOLDER_PREFIX
from nas.errors import CheckpointError, TrackingError
from nas.spaces.base import PRUNED
from nas.transfer.otdd import (
    DatasetSketch,
    OTDDConfig,
    cached_distance,
    distance,
    load_sketch,
    save_sketch,
    shapes,
)
from nas.transfer.supernet import WarmStart, WarmStartOptions, require_compatible
from nas.transfer.zoo import Card, ZooEntry, file_digest, load_entry
from pipeline.job import flat
from pipeline.registry import ACCURACY, DATA, Registered, logged_model_id, publish
from pipeline.steps import home
from pipeline.store import check_store
from pipeline.tracking import RunLog, Tracker

SUPERNET_FILE, CARD_FILE = "supernet.safetensors", "card.json"
EMBEDDING = shapes()  # of every sketch in the zoo, so that all of them can be compared
KIND, SUPERNET = "kind", "supernet"  # the tag that tells supernets from networks
SIGNATURE, DIGEST = "supernet.signature", "supernet.digest"
LONGEST_NAME = 200
PREFIX = "supernet-"  # of their names
DISTANCES = "distances"  # the folder of those that are known


@dataclass(frozen=True, eq=False)
class Beginning:
    """The supernet that a search goes on from, and how.

    Attributes:
        title: for people: "supernet-digits version 3".
        digest: of its file.
        run_id: that searched it; ``model_id`` is the logged model that has it.
        distance: from the target to it; None where nobody asked.
        overlap: share (0..1) of the target's images that it, or what it began with, was searched
            on.
    """

    title: str
    entry: ZooEntry
    digest: str
    options: WarmStartOptions
    run_id: str
    model_id: str
    distance: float | None
    overlap: float

    def warm_start(self) -> WarmStart:
        """What the search itself takes."""
        return WarmStart(self.entry.supernet, self.digest, self.options)

    @property
    def sources(self) -> str:
        """Names of the data sets behind it."""
        return "+".join(source.name for source in self.entry.card.sources)

    def parameters(self) -> dict[str, Any]:
        """Logged with the search."""
        return {"warm.source": self.title, **flat("warm", asdict(self.options))}

    def metrics(self) -> dict[str, float]:
        """Logged with the job."""
        known = {} if self.distance is None else {"warm/distance": self.distance}
        return {
            **known, "warm/overlap": self.overlap, "cost/source_seconds": self.entry.card.seconds
        }  # fmt: skip

    def lineage(self) -> dict[str, str]:
        """Tags that lead back to it."""
        return {"lineage.source_run": self.run_id, "lineage.source_supernet": self.digest}


@dataclass(frozen=True, eq=False)
class Stored:
    """A registered supernet, loaded and checked."""

    entry: ZooEntry
    sketches: tuple[DatasetSketch, ...]


def supernet_name(data_sets: Sequence[str]) -> str:
    """Its name in the registry: "supernet-digits", "supernet-digits+pets"."""
    names = sorted(
        Path(name.removeprefix(FOLDER_PREFIX)).expanduser().resolve().name
        if name.startswith(FOLDER_PREFIX)
        else name
        for name in data_sets
    )
    text = PREFIX + re.sub(r"[^\w.+-]", "-", "+".join(names))
    if len(text) <= LONGEST_NAME:
        return text
    return f"{PREFIX}{len(names)}-sets-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def publish_supernet(
    log: RunLog,
    name: str,
    path: Path,
    sketches: Callable[[], Sequence[DatasetSketch]],
    *,
    step: str,
    fresh: bool,
    say: Callable[[str], None],
) -> Registered:
    """Register the supernet of the file ``path`` as a version of ``name``, once for each ``step``.

    The version's model has the file, its card for people, and a sketch of each source. Its alias
    is `champion` or `challenger`, by the supernet's validation accuracy on the same data.

    Raises:
        CheckpointError: the file is no entry of a zoo.
        TrackingError: the registry refuses or does not answer.
    """
    check_registry()
    entry = load_entry(path)
    card, config, signature = entry.card, entry.supernet.config, entry.supernet.signature()

    def keep() -> str:
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(path, Path(place, SUPERNET_FILE))
            about = {"signature": signature, **asdict(card)}  # for people: the file has it, too
            Path(place, CARD_FILE).write_text(json.dumps(about, indent=2) + "\n")
            for number, sketch in enumerate(sketches()):
                save_sketch(Path(place, f"sketch-{number:03}.safetensors"), sketch)
            return log.log_output_model(SUPERNET, Path(place))

    names = ", ".join(source.name for source in card.sources)
    return publish(
        log,
        name,
        keep,
        step=step,
        about=f"Supernets searched on {names}, for other searches to begin with.",
        description=(
            f"A supernet of {config.cells} cells and {config.channels} channels, searched by "
            f"{card.method} on {names} for {len(card.accuracies)} epochs; validation accuracy "
            f"{card.accuracies[-1]:.2%}. Begin with it: -P transfer=supernet -P source={name}"
            + (f" -P method={card.method} -P warm_stages=1" if signature[PRUNED] else "")
        ),
        tags={
            KIND: SUPERNET,
            SIGNATURE: signature_text(signature),
            DIGEST: file_digest(path),
            ACCURACY: repr(card.accuracies[-1]),
            DATA: _data_digest(card),
            "dataset": names,
            "method": card.method,
            "seed": str(card.seed),
        },
        fresh=fresh,
        say=say,
    )


def signature_text(signature: Mapping[str, Any]) -> str:
    """A signature as a tag that can be compared."""
    return json.dumps(dict(signature), sort_keys=True, separators=(",", ":"))


def registered_supernets(tracker: Tracker) -> list[ModelVersion]:
    """All of them, the newest first.

    Raises:
        TrackingError: the registry does not answer.
    """
    check_registry()
    found: list[ModelVersion] = []
    token = None
    with tracker.reported("look for supernets"):
        while True:
            page = tracker.client.search_model_versions(
                f"tags.`{KIND}` = '{SUPERNET}'", page_token=token
            )
            found.extend(page)
            token = page.token
            if not token:
                break
    return sorted(found, key=lambda v: (v.creation_timestamp, v.name), reverse=True)


def misfit(version: ModelVersion, required: Mapping[str, Any]) -> str:
    """Why a registered supernet lacks something of what is ``required``; empty where it fits.

    By its tags alone: nothing is downloaded.
    """
    try:
        require_compatible(_signature(version), required)
    except CheckpointError as error:
        return str(error)
    return ""


def _signature(version: ModelVersion) -> Mapping[str, Any]:
    """From the tag; empty where somebody wrote something else there."""
    try:
        value = json.loads(version.tags.get(SIGNATURE, ""))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def load_stored(tracker: Tracker, version: ModelVersion) -> Stored:
    """The supernet of a registered version, compared with the digest it was registered with.

    Raises:
        CheckpointError: its files are gone, altered, or no supernet.
        TrackingError: the version is none of a supernet, or the store does not answer.
    """
    if version.tags.get(KIND) != SUPERNET:
        raise TrackingError(
            f"'{version.name}' version {version.version} is no supernet: a search begins with one "
            "that `-e pretrain` or --contribute registered"
        )
    folder = tracker.model_files(logged_model_id(version))
    entry = load_entry(folder / SUPERNET_FILE, version.tags.get(DIGEST, ""))
    sketches = [load_sketch(path) for path in sorted(folder.glob("sketch-*.safetensors"))]
    return Stored(entry, tuple(sketches))


def known_distance(a: DatasetSketch, b: DatasetSketch, *, fresh: bool) -> float:
    """OTDD as a search ranks by it; unless ``fresh``, what an earlier job has found it to be."""
    if fresh:
        return distance(a, b)
    return cached_distance(a, b, OTDDConfig(), home() / DISTANCES)


def check_registry() -> None:
    """Return if the model registry answers, where it is not the tracking store.

    Raises:
        TrackingError: within seconds, where it does not.
    """
    uri = mlflow.get_registry_uri()
    if uri == mlflow.get_tracking_uri():
        return
    try:
        check_store(uri)
    except TrackingError as error:
        raise TrackingError(
            "the model registry that MLFLOW_REGISTRY_URI names cannot be used (mend that variable, "
            f"or unset it, and the registry is the tracking store): {error}"
        ) from error


def _data_digest(card: Card) -> str:
    """Of one data set its own; of several a digest of theirs."""
    digests = [source.digest for source in card.sources]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("+".join(sorted(digests)).encode()).hexdigest()

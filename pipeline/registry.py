"""Everything the project says to the MLflow model registry."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import numpy as np
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from torch import nn

from nas.errors import ConfigurationError, TrackingError
from pipeline.serving import save_model, serve
from pipeline.tracking import RunLog, Tracker

if TYPE_CHECKING:
    from nas.data.task import ImageTask

CHAMPION, CHALLENGER = "champion", "challenger"
ACCURACY = "validation_accuracy"  # the tag that champions are compared by
DATA = "dataset_digest"  # the tag that must be equal for that: of pixels, labels and splits
STEP = "step.digest"  # the tag that names the step that registered the version
LINEAGE = "lineage."  # prefix of the tags that lead back to where a network came from
PREDICTION_IMAGES, PREDICTION_BYTES = 256, 2**24  # in one batch, at most
NAMES_A_PAGE, NAMES_SHOWN = 1000, 10
UNKNOWN_MODEL = "RESOURCE_DOES_NOT_EXIST"  # how MLflow says that it has no model of some name
MODEL_URI = re.compile(r"(?:models:/)?(?P<name>[^/:@]+)(?:@(?P<alias>.+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class Registered:
    """A new version of a registered model. ``uri`` names this version for ever."""

    name: str
    version: str
    alias: str
    uri: str
    model_id: str


@dataclass(frozen=True)
class RegisteredNetwork:
    """A registered version, loaded.

    Attributes:
        aliases: such as "champion".
        channels: of the images it takes, whose height and width are any.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    description: str
    tags: Mapping[str, str]
    run_id: str
    classes: tuple[str, ...]
    channels: int
    model: PyFuncModel

    def predict(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, classes] of N images, uint8 [H, W, C] each of its own size.

        An array [N, H, W, C] will do as well. Images of one size share batches.

        Raises:
            ConfigurationError: an image has another shape or type.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            self._check(image)
            alike[image.shape].append(number)
        probabilities = np.empty((len(images), len(self.classes)), dtype=np.float32)
        for shape, numbers in alike.items():
            size = max(1, min(PREDICTION_IMAGES, PREDICTION_BYTES // prod(shape)))
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                stacked = np.stack([images[number] for number in batch])
                probabilities[batch] = self.model.predict(stacked)
        return probabilities

    def _check(self, image: np.ndarray) -> None:
        of_its_channels = image.ndim == 3 and image.shape[2] == self.channels
        if image.dtype != np.uint8 or not of_its_channels or not image.size:
            raise ConfigurationError(
                f"'{self.name}' takes uint8 images [H, W, {self.channels}] of any height and "
                f"width from 1 pixel on, not {image.dtype} of shape {image.shape}"
            )


def register(
    log: RunLog,
    name: str,
    network: nn.Module,
    task: ImageTask,
    *,
    step: str,
    sample: np.ndarray,
    description: str,
    tags: Mapping[str, Any],
    validation_accuracy: float,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Registered:
    """Register ``network`` as a version of the model ``name``, once for each ``step``.

    A version that an earlier, killed attempt of the same step left behind is completed instead.

    The version becomes `champion` where there is none, or where its validation accuracy is higher
    than the champion's on the same data, split, limit and size; else `challenger`. A champion
    that it cannot be compared with keeps its alias, and a sentence says why.

    Args:
        log: the run that made the network; the version's lineage starts from it.
        step: the digest of the step that registers.
        sample: some images, uint8 [n, H, W, C]; kept as the input example.
        tags: what to find the version by, e.g. genotype digest, macs, params. The data set, its
            digest, the classes, the accuracy, the step and the run's ``lineage.*`` tags are added.
        validation_accuracy: 0..1.
        fresh: make a new version, whatever was left behind.

    Raises:
        ConfigurationError: the sample or the accuracy is not as above.
        TrackingError: the registry refuses, e.g. a name with a slash or a colon.
    """
    _check(sample, validation_accuracy)
    return publish(
        log,
        name,
        lambda: _log_model(log, network, task, sample),
        step=step,
        about=f"Classifies the images of {task.name}: {task.description}",
        description=description,
        tags={
            **_texts(tags),
            ACCURACY: repr(float(validation_accuracy)),
            "dataset": task.name,
            DATA: task.digest,
            "classes": json.dumps(task.classes),
        },
        fresh=fresh,
        say=say,
    )


def publish(
    log: RunLog,
    name: str,
    keep: Callable[[], str],
    *,
    step: str,
    about: str,
    description: str,
    tags: Mapping[str, str],
    fresh: bool,
    say: Callable[[str], None],
) -> Registered:
    """Make what ``keep`` stores a version of the model ``name``, once for each ``step``.

    Args:
        keep: stores the files as a logged model of the run and returns its id; not called where a
            killed attempt left a version behind.
        about: the model, where this is its first version.
        tags: among them the accuracy and the data's digest, by which champions are compared. The
            step and the run's ``lineage.*`` tags are added.

    Raises:
        TrackingError: the registry refuses.
    """
    tracker = log.tracker
    made = None if fresh else _left_behind(tracker, name, step)
    if made is not None:
        say(f"version {made.version} of {name} is there from an earlier attempt: going on with it")
    else:
        lineage = {key: value for key, value in log.tags().items() if key.startswith(LINEAGE)}
        made = _create_version(
            log, name, keep(), about=about, description=description,
            tags={**tags, **lineage, STEP: step},
        )  # fmt: skip
    model_id = logged_model_id(made)
    with tracker.reported(f"register the model '{name}'"):
        versions = json.dumps([{"name": name, "version": str(made.version)}])
        tracker.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: versions})
        alias = _alias_of(made) or _give_alias(tracker, made, say)
    log.log_model_output(model_id)
    uri = f"models:/{name}/{made.version}"
    return Registered(name, str(made.version), alias, uri, model_id)


def as_it_stands(tracker: Tracker, registered: Registered) -> Registered | None:
    """``registered`` with the alias it has today; None where the version was deleted since."""
    try:
        version = find_version(tracker, registered.uri)
    except TrackingError:
        return None
    return replace(registered, alias=_alias_of(version))


def resolve(tracker: Tracker, uri: str) -> RegisteredNetwork:
    """Load ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; ``NAME`` alone is its champion.

    Raises:
        TrackingError: there is no such model, alias or version, or it is not one of ours.
    """
    found = find_version(tracker, uri)
    with tracker.reported(f"load {uri}"):
        model = mlflow.pyfunc.load_model(f"models:/{found.name}/{found.version}")
    classes = (model.metadata.metadata or {}).get("classes")
    if not classes:
        raise TrackingError(
            f"{uri} names no classes: only networks that this project registered can be used"
        )
    return RegisteredNetwork(
        name=found.name,
        version=str(found.version),
        aliases=tuple(found.aliases),
        description=found.description or "",
        tags=dict(found.tags),
        run_id=found.run_id or "",
        classes=tuple(classes),
        channels=model.metadata.signature.inputs.inputs[0].shape[3],
        model=model,
    )


def find_version(tracker: Tracker, uri: str) -> ModelVersion:
    """The registered version that ``uri`` names, in a form that :func:`resolve` reads.

    Raises:
        TrackingError: there is none; the message says what there is.
    """
    parts = MODEL_URI.fullmatch(uri)
    if parts is None:
        raise TrackingError(f"'{uri}' is no model: write models:/NAME@champion or models:/NAME/1")
    name, wanted = parts["name"], parts["version"]
    with tracker.reported(f"find the model '{name}'"):
        model = _model(tracker, name)
        if model is None:
            raise TrackingError(f"no model '{name}' is registered: {_hint(tracker, name)}")
        alias = parts["alias"] or CHAMPION
        if wanted is None and alias not in model.aliases:
            known = ", ".join(f"@{alias}" for alias in sorted(model.aliases)) or "no aliases"
            raise TrackingError(f"the model '{name}' has no alias '{alias}': it has {known}")
        return tracker.client.get_model_version(name, wanted or model.aliases[alias])


def logged_model_id(version: ModelVersion) -> str:
    """The id of the logged model that one of our versions was made from."""
    return str(version.source or "").rpartition("/")[2]


def _model(tracker: Tracker, name: str) -> RegisteredModel | None:
    try:
        return tracker.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == UNKNOWN_MODEL:
            return None
        raise


def _hint(tracker: Tracker, name: str) -> str:
    """What there is instead of ``name``, the nearest first."""
    names: list[str] = []
    token = None
    while True:
        page = tracker.client.search_registered_models(max_results=NAMES_A_PAGE, page_token=token)
        names.extend(model.name for model in page)
        token = page.token
        if not token:
            break
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return f"{hint}there are {', '.join(sorted(names)[:NAMES_SHOWN]) or 'none'}{more}"


def _check(sample: np.ndarray, validation_accuracy: float) -> None:
    if sample.dtype != np.uint8 or sample.ndim != 4 or not sample.size:
        raise ConfigurationError(
            "a model is registered with one or more sample images, uint8 [n, H, W, C], not "
            f"{sample.dtype} of shape {sample.shape}"
        )
    if not 0 <= validation_accuracy <= 1:
        raise ConfigurationError(
            f"a validation accuracy lies within 0 and 1, {validation_accuracy} does not"
        )


def _log_model(log: RunLog, network: nn.Module, task: ImageTask, sample: np.ndarray) -> str:
    """Store the exported program as a logged model of the run and return its id."""
    client = log.tracker.client
    with log.tracker.reported("keep the model"), tempfile.TemporaryDirectory() as folder:
        experiment_id = client.get_run(log.run_id).info.experiment_id
        logged = client.create_logged_model(experiment_id, "model", source_run_id=log.run_id)
        try:
            path = Path(folder) / "model"
            save_model(serve(network, task), path, sample, task.classes, logged)
            client.log_model_artifacts(logged.model_id, str(path))
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        except BaseException:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            raise
    return str(logged.model_id)


def _left_behind(tracker: Tracker, name: str, step: str) -> ModelVersion | None:
    """The latest version that ``step`` has made; killed before its end, it lacks the rest."""
    with tracker.reported(f"look for versions of '{name}'"):
        found = tracker.client.search_model_versions(
            f"name = '{name}' and tags.`{STEP}` = '{step}'"
        )
        if not found:
            return None
        latest = max(int(version.version) for version in found)
        return tracker.client.get_model_version(name, str(latest))  # with its aliases


def _create_version(
    log: RunLog, name: str, model_id: str, *, about: str, description: str, tags: Mapping[str, str]
) -> ModelVersion:
    client = log.tracker.client
    with log.tracker.reported(f"register the model '{name}'"):
        if _model(log.tracker, name) is None:
            client.create_registered_model(name, description=about)
        return client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=log.run_id,
            tags=dict(tags),
            description=description,
            model_id=model_id,
        )


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _alias_of(version: ModelVersion) -> str:
    return next((alias for alias in (CHAMPION, CHALLENGER) if alias in version.aliases), "")


def _give_alias(tracker: Tracker, made: ModelVersion, say: Callable[[str], None]) -> str:
    name = made.name
    best = tracker.client.get_registered_model(name).aliases.get(CHAMPION)
    champion = None if best is None else tracker.client.get_model_version(name, best)
    alias = CHAMPION if champion is None or _beats(made, champion, say) else CHALLENGER
    tracker.client.set_registered_model_alias(name, alias, made.version)
    return alias


def _beats(made: ModelVersion, champion: ModelVersion, say: Callable[[str], None]) -> bool:
    """Whether the new version is better; where that cannot be known, say why it is not."""
    old, new = f"version {champion.version}", f"version {made.version}"
    if champion.tags.get(DATA) != made.tags[DATA]:
        reason = f"{old} was measured on other data, or on another split, limit or size of them"
    else:
        try:
            return float(made.tags[ACCURACY]) > float(champion.tags[ACCURACY])
        except (KeyError, ValueError):
            reason = f"the tag {ACCURACY} of {old} is missing or no number"
    say(
        f"{old} of {made.name} stays champion, as {new} cannot be compared with it: {reason}; to "
        f"promote {new}, give it the alias in the MLflow UI or by MlflowClient()."
        f"set_registered_model_alias('{made.name}', '{CHAMPION}', '{made.version}')"
    )
    return False

"""Everything the project says to the MLflow model registry.

A network is registered as an exported program with its preprocessing inside: raw images in,
probabilities out. MLflow and torch are enough to use it; nothing in it is pickled code.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import torch
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PyFuncModel
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from torch import Tensor, nn

from nas.data.scaling import scale_to_cover
from nas.errors import ConfigurationError, TrackingError
from pipeline.tracking import RunLog, Tracker

if TYPE_CHECKING:
    from nas.data.task import ImageTask

CHAMPION, CHALLENGER = "champion", "challenger"
ACCURACY = "validation_accuracy"  # the tag that champions are compared by
LINEAGE = "lineage."  # prefix of the tags that lead back to where a network came from
PREDICTION_BATCH = 256
MODEL_URI = re.compile(r"(?:models:/)?(?P<name>[^/:@]+)(?:@(?P<alias>.+)|/(?P<version>\d+))?")


class ServedNetwork(nn.Module):
    """A network with its preprocessing: uint8 [N, H, W, C] -> probabilities float32 [N, classes].

    Args:
        network: maps normalised float32 [N, C, height, width] to logits [N, classes].
        mean: per channel, of pixels scaled to 0..1.
        std: likewise.
        size: (height, width) that the network was trained on; other images are scaled to it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        if pixels.shape[2:] != self.size:
            pixels = scale_to_cover(pixels, *self.size)
        return torch.softmax(self.network((pixels / 255 - self.mean) / self.std), dim=1)


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
        shape: height, width and channels of the images it takes.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    description: str
    tags: Mapping[str, str]
    run_id: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    model: PyFuncModel

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, classes] of uint8 images [N, H, W, C], for N of 1 and more.

        Raises:
            ConfigurationError: the images have another shape or type.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ConfigurationError(
                f"'{self.name}' takes uint8 images of shape {('N', *self.shape)} with N at least "
                f"1, not {images.dtype} of shape {images.shape}"
            )
        starts = range(0, len(images), PREDICTION_BATCH)
        return np.concatenate(
            [self.model.predict(images[start : start + PREDICTION_BATCH]) for start in starts]
        )


def register(
    log: RunLog,
    name: str,
    network: nn.Module,
    task: ImageTask,
    *,
    sample: np.ndarray,
    description: str,
    tags: Mapping[str, Any],
    validation_accuracy: float,
    say: Callable[[str], None] = print,
) -> Registered:
    """Register ``network`` as a new version of the model ``name``.

    The version becomes `champion` where there is none or where its validation accuracy is higher
    than the champion's, else `challenger`. A champion without a readable accuracy keeps its alias:
    somebody put it there by hand, and a comparison is impossible.

    Args:
        log: the run that made the network; the version's lineage starts from it.
        sample: some images, uint8 [n, H, W, C] with n of 2 and more; kept as the input example.
        tags: what to find the version by, e.g. genotype digest, macs, params. The data set, its
            digest, the classes, the accuracy and the run's ``lineage.*`` tags are added.
        validation_accuracy: 0..1.

    Raises:
        ConfigurationError: the sample or the accuracy is not as above.
        TrackingError: the registry refuses, e.g. a name with a slash or a colon.
    """
    _check(sample, validation_accuracy)
    client = log.tracker.client
    model_id = _log_model(log, network, task, sample)
    with log.tracker.reported(f"register the model '{name}'"):
        champion = _champion(log.tracker, name)
        if champion is None and not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(
                name, description=f"Classifies the images of {task.name}: {task.description}"
            )
        made = client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=log.run_id,
            tags=_texts(tags) | _version_tags(log, task, validation_accuracy),
            description=description,
            model_id=model_id,
        )
        versions = json.dumps([{"name": name, "version": made.version}])
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: versions})
        alias = _choose_alias(champion, validation_accuracy, say)
        client.set_registered_model_alias(name, alias, made.version)
    uri = f"models:/{name}/{made.version}"
    return Registered(name, str(made.version), alias, uri, model_id)


def as_it_stands(tracker: Tracker, registered: Registered) -> Registered | None:
    """``registered`` with the alias it has today; None where the version was deleted since."""
    try:
        version = find_version(tracker, registered.uri)
    except TrackingError:
        return None
    alias = next((alias for alias in (CHAMPION, CHALLENGER) if alias in version.aliases), "")
    return replace(registered, alias=alias)


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
    _, height, width, channels = model.metadata.signature.inputs.inputs[0].shape
    return RegisteredNetwork(
        name=found.name,
        version=str(found.version),
        aliases=tuple(found.aliases),
        description=found.description or "",
        tags=dict(found.tags),
        run_id=found.run_id or "",
        classes=tuple(classes),
        shape=(height, width, channels),
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
    with tracker.reported("list its models"):
        models = {model.name: model for model in tracker.client.search_registered_models()}
        if name not in models:
            near = get_close_matches(name, models, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            known = ", ".join(sorted(models)) or "none"
            raise TrackingError(f"no model '{name}' is registered: {hint}there are {known}")
        aliases = models[name].aliases
        alias = parts["alias"] or CHAMPION
        if wanted is None and alias not in aliases:
            known = ", ".join(f"@{alias}" for alias in sorted(aliases)) or "no aliases"
            raise TrackingError(f"the model '{name}' has no alias '{alias}': it has {known}")
        return tracker.client.get_model_version(name, wanted or aliases[alias])


def _check(sample: np.ndarray, validation_accuracy: float) -> None:
    if sample.dtype != np.uint8 or sample.ndim != 4 or len(sample) < 2:
        raise ConfigurationError(
            "a model is registered with two or more sample images, uint8 [n, H, W, C], not "
            f"{sample.dtype} of shape {sample.shape}"
        )
    if not 0 <= validation_accuracy <= 1:
        raise ConfigurationError(
            f"a validation accuracy lies within 0 and 1, {validation_accuracy} does not"
        )


def _log_model(log: RunLog, network: nn.Module, task: ImageTask, sample: np.ndarray) -> str:
    """Store the exported program as a logged model of the run and return its id."""
    served = _served(network, task)
    client = log.tracker.client
    with log.tracker.reported("keep the model"), tempfile.TemporaryDirectory() as folder:
        experiment_id = client.get_run(log.run_id).info.experiment_id
        logged = client.create_logged_model(experiment_id, "model", source_run_id=log.run_id)
        try:
            path = Path(folder) / "model"
            _save(served, path, sample, task.classes, logged.artifact_location, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(path))
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        except BaseException:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            raise
        client.log_outputs(log.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _served(network: nn.Module, task: ImageTask) -> ServedNetwork:
    network = copy.deepcopy(network).cpu()
    if hasattr(network, "auxiliary_head"):  # it serves training only
        network.auxiliary_head = None  # type: ignore[assignment]
    size = (task.shape.height, task.shape.width)
    return ServedNetwork(network, task.mean, task.std, size).eval()


def _save(
    served: ServedNetwork,
    path: Path,
    sample: np.ndarray,
    classes: tuple[str, ...],
    location: str,
    model_id: str,
) -> None:
    # Without names: MLflow hands a named tensor over in a dict, which the PyTorch flavour refuses.
    inputs = TensorSpec(np.dtype(np.uint8), (-1, *sample.shape[1:]))
    outputs = TensorSpec(np.dtype(np.float32), (-1, len(classes)))
    model = Model(
        artifact_path=location,
        model_uuid=model_id,
        model_id=model_id,
        metadata={"classes": list(classes)},
    )
    mlflow.pytorch.save_model(
        served,
        str(path),
        mlflow_model=model,
        signature=ModelSignature(Schema([inputs]), Schema([outputs])),
        input_example=sample,
        pip_requirements=[_pinned(package) for package in ("torch", "mlflow", "numpy")],
        serialization_format="pt2",
    )
    # An exported program stays on the device it was exported on, but MLflow would look for it on
    # the GPU wherever there is one, and refuse.
    model.flavors["python_function"]["config"]["device"] = "cpu"
    model.save(str(path / "MLmodel"))


def _pinned(package: str) -> str:
    return f"{package}=={version(package).partition('+')[0]}"  # no index has torch's +cu132


def _version_tags(log: RunLog, task: ImageTask, validation_accuracy: float) -> dict[str, str]:
    lineage = {key: value for key, value in log.tags().items() if key.startswith(LINEAGE)}
    return {
        ACCURACY: repr(float(validation_accuracy)),
        "dataset": task.name,
        "dataset_digest": task.digest,
        "classes": json.dumps(task.classes),
        **lineage,
    }


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _champion(tracker: Tracker, name: str) -> ModelVersion | None:
    for model in tracker.client.search_registered_models(f"name = '{name}'"):
        if CHAMPION in model.aliases:
            return tracker.client.get_model_version(name, model.aliases[CHAMPION])
    return None


def _choose_alias(
    champion: ModelVersion | None, validation_accuracy: float, say: Callable[[str], None]
) -> str:
    if champion is None:
        return CHAMPION
    try:
        to_beat = float(champion.tags[ACCURACY])
    except (KeyError, ValueError):
        say(
            f"version {champion.version} of {champion.name} stays champion: its tag {ACCURACY} "
            "cannot be read, so the new version cannot be compared with it"
        )
        return CHALLENGER
    return CHAMPION if validation_accuracy > to_beat else CHALLENGER

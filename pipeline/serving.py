"""A network as others use it: an exported program with its preprocessing inside.

Raw images of any size in, probabilities out. MLflow and torch are enough to use it; nothing in it
is pickled code.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow.pytorch
import numpy as np
import torch
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.models.utils import _save_example
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from nas.data.scaling import scale_to_cover

if TYPE_CHECKING:
    from nas.data.task import ImageTask


class ServedNetwork(nn.Module):
    """A network with its preprocessing: uint8 [N, H, W, C] -> probabilities float32 [N, classes].

    H and W are any; the images are scaled as those were that the network was tested on.

    Args:
        network: maps normalised float32 [N, C, height, width] to logits [N, classes].
        mean: per channel, of pixels scaled to 0..1.
        std: likewise.
        size: (height, width) that the network was trained on.
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
        pixels = images.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        scaled = scale_to_cover(pixels, *self.size).contiguous(memory_format=torch.channels_last)
        return torch.softmax(self.network((scaled / 255 - self.mean) / self.std), dim=1)


def serve(network: nn.Module, task: ImageTask) -> ServedNetwork:
    """A copy of ``network`` on the CPU, with the preprocessing of ``task``, ready to be used."""
    network = copy.deepcopy(network).cpu()
    if hasattr(network, "auxiliary_head"):  # it serves training only
        network.auxiliary_head = None  # type: ignore[assignment]
    size = (task.shape.height, task.shape.width)
    return ServedNetwork(network, task.mean, task.std, size).eval()


def save_model(
    served: ServedNetwork,
    path: Path,
    sample: np.ndarray,
    classes: tuple[str, ...],
    model: LoggedModel,
) -> None:
    """Write ``served`` into the new folder ``path``, as the files of the logged model ``model``.

    ``sample``, uint8 [n, H, W, C] with n of 1 and more, is kept as the input example.
    """
    # Without names: MLflow hands a named tensor over in a dict, which the PyTorch flavour refuses.
    channels = sample.shape[3]
    inputs = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, channels))
    outputs = TensorSpec(np.dtype(np.float32), (-1, len(classes)))
    description = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={"classes": list(classes)},
    )
    # What is traced has another size than the network and more than one of everything, or else
    # the exported program would take these sizes for constants; so it is not the user's sample.
    height, width = served.size
    traced = np.zeros((2, height + 1, width + 2, channels), dtype=np.uint8)
    mlflow.pytorch.save_model(
        served,
        str(path),
        mlflow_model=description,
        signature=ModelSignature(Schema([inputs]), Schema([outputs])),
        input_example=traced,
        pip_requirements=[_pinned(package) for package in ("torch", "mlflow", "numpy")],
        serialization_format="pt2",
    )
    _save_example(description, sample, str(path))
    # An exported program stays on the device it was exported on, but MLflow would look for it on
    # the GPU wherever there is one, and refuse.
    description.flavors["python_function"]["config"]["device"] = "cpu"
    description.save(str(path / "MLmodel"))


def _pinned(package: str) -> str:
    return f"{package}=={version(package).partition('+')[0]}"  # no index has torch's +cu132

"""Features of networks: a supernet's own trunk, or torchvision's pretrained ResNets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nas.errors import DataError, UnknownNameError
from nas.evaluation import evaluating
from nas.spaces.darts.supernet import Mixing, Supernet
from nas.transfer.otdd.embedding import Embedding, digest_of, to_common

RESNETS = ("resnet18", "resnet34", "resnet50")
RESNET_SIDE = 128  # pixels, as in the supernet-transfer paper's distances
# of ImageNet, which torchvision's weights were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def supernet_trunk(
    supernet: Supernet, mixing: Mixing, mean: Sequence[float], std: Sequence[float]
) -> Embedding:
    """The pooled features before the classifier of a searched supernet; works offline.

    Images are brought to the side and the channels that the supernet was searched with, and
    normalised by ``mean`` and ``std`` of its data set (per channel, of pixels in 0..1). It runs in
    evaluation mode: batch statistics would let images change one another's features.

    Args:
        mixing: as the supernet's method gives it, e.g. ``find_method(name).mixing(supernet)``.
    """
    fixed = mixing.detach()
    shape = supernet.shape
    side, device = min(shape.height, shape.width), supernet.weights.device

    def embed(images: Tensor) -> Tensor:
        batch = _normalised(to_common(images, side, shape.channels), mean, std).to(device)
        with evaluating(supernet):
            return supernet.features(batch, fixed).cpu()

    tensors = [tensor for _, tensor in sorted(supernet.state_dict().items())]
    edges = () if fixed.edges is None else (fixed.edges,)
    settings = (supernet.config, shape, tuple(mean), tuple(std))
    digest = digest_of("supernet", settings, *tensors, fixed.operations, *edges)
    return Embedding(f"trunk of a supernet for {side}x{side}x{shape.channels}", digest, embed)


def pretrained(
    name: str, folder: Path, device: torch.device | str = "cpu", *, download: bool = True
) -> Embedding:
    """Pooled features of a ResNet that torchvision trained on ImageNet, at 128 pixels.

    ``resnet18`` is what the supernet-transfer paper measured with; it left its images without
    normalisation, here they have that of the weights.

    Args:
        folder: where torchvision's file of the weights is, or is downloaded to.
        download: whether it may be.

    Raises:
        UnknownNameError: none of the ResNets known here.
        DataError: the weights are not there and cannot be had, or are damaged.
    """
    if name not in RESNETS:
        raise UnknownNameError("pretrained network", name, RESNETS)
    import torchvision  # seconds

    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = folder / weights.url.rpartition("/")[2]
    if not download and not file.exists():
        raise DataError(_hint(name, file, "it may not be downloaded"))
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, str(folder), progress=False, check_hash=True, weights_only=True
        )
        network = torchvision.models.get_model(name)
        network.load_state_dict(state)
    except Exception as error:  # no network, a full disk, a file that is something else
        raise DataError(_hint(name, file, str(error).splitlines()[0])) from error
    network.fc = nn.Identity()
    network.eval().to(device)

    def embed(images: Tensor) -> Tensor:
        batch = _normalised(to_common(images, RESNET_SIDE, 3), IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            features: Tensor = network(batch.to(device))
        return features.cpu()

    return Embedding(f"pretrained {name}", digest_of("pretrained", str(weights)), embed)


def _hint(name: str, file: Path, reason: str) -> str:
    return (
        f"the pretrained weights of {name} cannot be had ({reason}): put torchvision's file at "
        f"{file}, or choose features that work offline: pixels, pca, or a supernet's trunk"
    )


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float [n, C, H, W] in 0..1, standardised per channel."""
    shift, scale = images.new_tensor(mean), images.new_tensor(std)
    return (images - shift[:, None, None]) / scale[:, None, None]

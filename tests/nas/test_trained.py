"""Networks and supernets on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.architecture import Skeleton
from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import TaskShape
from nas.errors import CheckpointError
from nas.randomness import generator
from nas.search import METHODS
from nas.spaces import DartsSpace
from nas.spaces.darts import PUBLISHED
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.trained import TrainedNetwork, load_network, load_supernet, save_network, save_supernet

SHAPE = TaskShape(1, 8, 8, 4)
ARCHITECTURE = DartsSpace().from_genotype(PUBLISHED["PDARTS"], Skeleton("cifar", 4, 3))
PCDARTS = SupernetConfig(channels=4, cells=3, partial=2, edge_normalisation=True)


def draw_images(seed: int = 0) -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=generator(seed, "images"))


@pytest.fixture
def trained() -> TrainedNetwork:
    """A network with an auxiliary head whose running statistics have moved."""
    network = DartsSpace().network(ARCHITECTURE, SHAPE, auxiliary=True, generator=generator(0))
    network.train()
    network(draw_images(1))
    return TrainedNetwork(network.eval(), ARCHITECTURE, SHAPE)


@pytest.fixture
def network_file(trained: TrainedNetwork, tmp_path: Path) -> Path:
    save_network(tmp_path / "network", trained)
    return tmp_path / "network"


@pytest.fixture
def supernet() -> Supernet:
    supernet = Supernet(SHAPE, PCDARTS, seed=3)
    supernet(draw_images(1), METHODS["pcdarts"].mixing(supernet))
    return supernet


@pytest.fixture
def supernet_file(supernet: Supernet, tmp_path: Path) -> Path:
    save_supernet(tmp_path / "supernet", supernet, {"method": "pcdarts", "seed": 3})
    return tmp_path / "supernet"


def test_a_loaded_network_computes_the_same(trained: TrainedNetwork, network_file: Path) -> None:
    loaded = load_network(network_file)
    assert (loaded.architecture, loaded.shape) == (ARCHITECTURE, SHAPE)
    assert not loaded.network.training
    with torch.no_grad():
        assert torch.equal(loaded.network(draw_images()), trained.network(draw_images()))


def test_channels_last_weights_are_saved_like_others(
    trained: TrainedNetwork, network_file: Path, tmp_path: Path
) -> None:
    """Training keeps its network in that layout; the loaded one is in the plain one."""
    trained.network.to(memory_format=torch.channels_last)
    save_network(tmp_path / "last", trained)
    plain = load_network(network_file).network.state_dict()
    for name, tensor in load_network(tmp_path / "last").network.state_dict().items():
        assert torch.equal(tensor, plain[name])


def test_the_auxiliary_head_stays_out(trained: TrainedNetwork, network_file: Path) -> None:
    names = set(load_checkpoint(network_file).tensors)
    wanted = {n for n in trained.network.state_dict() if not n.startswith("auxiliary_head")}
    assert names == wanted < set(trained.network.state_dict())
    assert load_network(network_file).network.auxiliary_head is None


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_supernet_computes_the_same(
    training: bool, supernet: Supernet, supernet_file: Path
) -> None:
    loaded = load_supernet(supernet_file)
    assert (loaded.config, loaded.shape) == (supernet.config, supernet.shape)
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    scores = [
        net.train(training)(draw_images(), METHODS["pcdarts"].mixing(net))
        for net in (supernet, loaded)
    ]
    assert torch.equal(*scores)


def test_a_supernet_file_has_every_tensor_by_name(supernet: Supernet, supernet_file: Path) -> None:
    checkpoint = load_checkpoint(supernet_file)
    assert checkpoint.values["about"] == {"method": "pcdarts", "seed": 3}
    weights = {n: t for n, t in checkpoint.tensors.items() if n.startswith("weights.")}
    assert sum(tensor.numel() for tensor in weights.values()) == supernet.weights.numel()
    assert weights["weights.cells.1.pointwise"].shape == (14, 6, 4, 4)
    assert set(checkpoint.tensors) - set(weights) == {
        "alphas", "betas", "dropped", "running_mean", "running_variance"
    }  # fmt: skip


# ---- files that are not what they should be ----


def edited(path: Path, change: Callable[[dict, dict], object]) -> Path:
    """The same checkpoint with something changed, and a digest that is right again."""
    checkpoint = load_checkpoint(path)
    tensors, values = dict(checkpoint.tensors), dict(checkpoint.values)
    change(tensors, values)
    save_checkpoint(path, Checkpoint(tensors, values))
    return path


def test_one_kind_is_not_the_other(network_file: Path, supernet_file: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no network"):
        load_network(supernet_file)
    with pytest.raises(CheckpointError, match="holds no supernet"):
        load_supernet(network_file)


def test_damaged_files(network_file: Path, supernet_file: Path) -> None:
    draw = generator(0, "damage")
    for path, load in ((network_file, load_network), (supernet_file, load_supernet)):
        data = path.read_bytes()
        for cut in torch.randint(len(data), (15,), generator=draw).tolist():
            path.write_bytes(data[:cut])
            with pytest.raises(CheckpointError):
                load(path)
        for place in torch.randint(len(data), (15,), generator=draw).tolist():
            altered = bytearray(data)
            altered[place] ^= 0x10
            path.write_bytes(altered)
            with pytest.raises(CheckpointError):
                load(path)
        path.write_bytes(b"")
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("classifier.bias"), "lacks the tensor 'classifier.bias'"),
        (lambda t, v: t.update({"classifier.bias": torch.zeros(5)}), r"shape \(5,\), but \(4,\)"),
        (lambda t, v: v.pop("architecture"), "describes no network that can be built"),
        (lambda t, v: v.pop("shape"), "describes no network that can be built"),
        (lambda t, v: v.update(shape=[1, 8, 8, 4]), "describes no network that can be built"),
        (lambda t, v: v["shape"].update(depth=3), "describes no network that can be built"),
        (lambda t, v: v["shape"].update(classes="many"), "describes no network that can be built"),
        (lambda t, v: v["shape"].update(classes=-4), "describes no network that can be built"),
        (lambda t, v: v["architecture"].update(space="mars"), "unknown space 'mars'"),
        (lambda t, v: v["architecture"]["decisions"].popitem(), "is missing"),
        (lambda t, v: v["architecture"]["skeleton"].update(channels=8), "is wanted"),
        (lambda t, v: v.update(kind=["network"]), "holds no network"),
    ],
)
def test_networks_that_do_not_fit(
    change: Callable[[dict, dict], object], message: str, network_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_network(edited(network_file, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("betas"), "lacks the tensor 'betas'"),
        (lambda t, v: t.pop("weights.cells.0.pointwise"), "lacks the tensor 'weights.cells.0"),
        (lambda t, v: t.update(alphas=torch.zeros(2, 14, 7)), r"\(2, 14, 7\), but \(2, 14, 8\)"),
        (lambda t, v: v["config"].update(cells=1), "no normal cell"),
        (lambda t, v: v["config"].update(speed=1), "describes no supernet that can be built"),
        (lambda t, v: v["config"].update(channels="x"), "describes no supernet that can be built"),
        (lambda t, v: v["shape"].update(classes=-1), "describes no supernet that can be built"),
        (lambda t, v: v.pop("config"), "describes no supernet that can be built"),
    ],
)
def test_supernets_that_do_not_fit(
    change: Callable[[dict, dict], object], message: str, supernet_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_supernet(edited(supernet_file, change))


def test_a_missing_file(tmp_path: Path) -> None:
    for load in (load_network, load_supernet):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load(tmp_path / "nothing")

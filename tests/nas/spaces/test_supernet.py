from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference_supernet import Network, parameter_pairs, reference_of, statistics_pairs
from torch import Tensor, nn

from nas.architecture import Skeleton
from nas.data import TaskShape
from nas.errors import ConfigurationError
from nas.randomness import generator
from nas.search import METHODS
from nas.spaces.darts import EDGES, OPERATIONS, DartsSpace, Gene, Genotype
from nas.spaces.darts.supernet import Mixing, Supernet, SupernetConfig

CIFAR = TaskShape(3, 32, 32, 10)
ODD = TaskShape(2, 7, 9, 5)
METHOD = METHODS["darts"]
TOLERANCE = 1e-10  # relative to the largest entry of a tensor, in double precision

CONFIGS = {
    "darts": SupernetConfig(channels=4, cells=3),
    "edge-normalised": SupernetConfig(channels=4, cells=3, edge_normalisation=True),
    "half": SupernetConfig(channels=4, cells=3, partial=2),
    "pcdarts-2": SupernetConfig(channels=4, cells=3, partial=2, edge_normalisation=True),
    "pcdarts-4": SupernetConfig(channels=8, cells=3, partial=4, edge_normalisation=True),
    "all-partial": SupernetConfig(channels=4, cells=3, partial=4, edge_normalisation=True),
}
CONVOLUTIONS = Genotype(
    normal=tuple(
        Gene(operation, source)
        for operation, source in zip(
            ["sep_conv_3x3", "skip_connect", "dil_conv_5x5", "sep_conv_5x5"] * 2,
            [0, 1, 0, 2, 1, 3, 3, 4],
            strict=True,
        )
    ),
    reduce=tuple(
        Gene(operation, source)
        for operation, source in zip(
            ["skip_connect", "sep_conv_5x5", "dil_conv_3x3", "skip_connect"] * 2,
            [0, 1, 1, 2, 0, 1, 0, 4],
            strict=True,
        )
    ),
)


def make(
    config: SupernetConfig, shape: TaskShape = ODD, seed: int = 0, backend: str = "auto"
) -> Supernet:
    """A supernet in double precision with alphas and betas far from uniform."""
    supernet = Supernet(shape, config, seed=seed, backend=backend).double()
    draw = generator(seed, "test", "architecture")
    with torch.no_grad():
        for parameter in supernet.architecture_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        # scale and shift that are not one and zero
        for name, view in supernet.named_weights():
            if name in ("stem.scale", "stem.shift"):
                view += 0.3 * torch.randn(view.shape, generator=draw, dtype=torch.float64)
    return supernet


def draw_images(shape: TaskShape, batch: int = 2, seed: int = 0) -> Tensor:
    size = (batch, shape.channels, shape.height, shape.width)
    return torch.randn(size, generator=generator(seed, "images"), dtype=torch.float64)


def reference_mixing(alphas: Tensor, betas: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the operations of an edge, and over the edges into a node."""
    operations = alphas.exp() / alphas.exp().sum(-1, keepdim=True)
    if betas is None:
        return operations, None
    nodes = [betas[:, 0:2], betas[:, 2:5], betas[:, 5:9], betas[:, 9:14]]
    return operations, torch.cat([n.exp() / n.exp().sum(-1, keepdim=True) for n in nodes], 1)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    scale = max(theirs.abs().max().item(), 1e-3) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * scale)


def architecture_leaves(supernet: Supernet) -> tuple[Tensor, Tensor | None]:
    betas = None if supernet.betas is None else supernet.betas.detach().clone().requires_grad_()
    return supernet.alphas.detach().clone().requires_grad_(), betas


# ---- the packed supernet against the papers' modules ----


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_modules_of_the_paper(name: str, backend: str) -> None:
    supernet = make(CONFIGS[name], backend=backend)
    network = reference_of(supernet)
    alphas, betas = architecture_leaves(supernet)
    labels = torch.tensor([1, 4])
    for step in range(2):  # the second sees running statistics that are no longer 0 and 1
        images = draw_images(ODD, seed=step)
        supernet.zero_grad()
        network.zero_grad()
        alphas.grad = None
        scores = supernet(images, METHOD.mixing(supernet))
        expected = network(images, *reference_mixing(alphas, betas))
        assert_equal(scores, expected)
        F.cross_entropy(scores, labels).backward()
        F.cross_entropy(expected, labels).backward()
    assert supernet.weights.grad is not None
    gradients = named_like_weights(supernet, supernet.weights.grad)
    for parameter, gradient in parameter_pairs(network, gradients):
        assert parameter.grad is not None
        assert_equal(gradient, parameter.grad)
    assert_equal(supernet.alphas.grad, alphas.grad)
    for module, mean, variance in statistics_pairs(network, supernet):
        assert_equal(mean, module.running_mean)
        assert_equal(variance, module.running_var)

    supernet.eval()
    network.eval()
    images = draw_images(ODD, batch=1, seed=9)
    before = supernet.running_mean.clone()
    scores = supernet(images, METHOD.mixing(supernet))
    assert_equal(scores, network(images, *reference_mixing(alphas, betas)))
    assert torch.equal(supernet.running_mean, before)


@pytest.mark.parametrize("name", ["edge-normalised", "pcdarts-2", "pcdarts-4"])
def test_gradients_of_the_betas_equal_those_of_the_modules(name: str, backend: str) -> None:
    supernet = make(CONFIGS[name], backend=backend)
    network = reference_of(supernet)
    alphas, betas = architecture_leaves(supernet)
    images = draw_images(ODD)
    supernet(images, METHOD.mixing(supernet)).square().sum().backward()
    network(images, *reference_mixing(alphas, betas)).square().sum().backward()
    assert supernet.betas is not None
    assert betas is not None
    assert_equal(supernet.betas.grad, betas.grad)
    assert_equal(supernet.alphas.grad, alphas.grad)


def named_like_weights(supernet: Supernet, flat: Tensor) -> dict[str, Tensor]:
    """``flat`` cut up as the weights are, found by where each named view starts."""
    return {
        name: flat.as_strided(view.shape, view.stride(), view.storage_offset())
        for name, view in supernet.named_weights()
    }


def test_every_weight_has_exactly_one_name() -> None:
    supernet = make(CONFIGS["pcdarts-2"])
    counts = torch.zeros_like(supernet.weights)
    for view in named_like_weights(supernet, counts).values():
        view += 1
    assert torch.equal(counts, torch.ones_like(counts))


def test_statistics_are_left_alone_when_asked(backend: str) -> None:
    supernet = make(CONFIGS["pcdarts-2"], backend=backend)
    before = supernet.running_mean.clone(), supernet.running_variance.clone()
    mixing = METHOD.mixing(supernet)
    quiet = supernet(draw_images(ODD), mixing, update_statistics=False)
    assert torch.equal(supernet.running_mean, before[0])
    assert torch.equal(supernet.running_variance, before[1])
    assert torch.equal(quiet, supernet(draw_images(ODD), mixing))
    assert not torch.equal(supernet.running_mean, before[0])


def test_other_weights_can_stand_in() -> None:
    supernet, other = make(CONFIGS["darts"]), make(CONFIGS["darts"], seed=1)
    mixing = METHOD.mixing(supernet)
    images = draw_images(ODD)
    expected = other(images, mixing)
    before = supernet.weights.detach().clone()
    assert torch.equal(supernet(images, mixing, weights=other.weights), expected)
    assert torch.equal(supernet.weights, before)


# ---- sizes and first weights ----


@pytest.mark.parametrize(
    ("config", "weights", "architecture"),
    [
        (SupernetConfig(), 1_930_618, 224),
        (SupernetConfig(partial=4, edge_normalisation=True), 299_578, 252),
    ],
)
def test_published_sizes(config: SupernetConfig, weights: int, architecture: int) -> None:
    supernet = Supernet(CIFAR, config, seed=0)
    assert supernet.weights.numel() == weights
    assert sum(p.numel() for p in supernet.architecture_parameters()) == architecture


@pytest.mark.parametrize("name", ["darts", "pcdarts-2"])
def test_as_many_weights_as_the_modules(name: str) -> None:
    config = CONFIGS[name]
    network = Network(2, config.channels, config.cells, 5, config.partial)
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert Supernet(ODD, config, seed=0).weights.numel() == weights


def test_first_weights_are_those_of_torch_layers() -> None:
    """Uniform within 1 / sqrt(fan-in), the fan-in read off modules of torch."""
    supernet = Supernet(CIFAR, SupernetConfig(cells=3), seed=0)
    network = Network(3, 16, 3, 10, 1)
    fan_in = {p: p[0].numel() for p in network.parameters() if p.dim() > 1}
    fan_in[network.classifier.bias] = network.classifier.in_features
    seen = 0
    for parameter, value in parameter_pairs(network, dict(supernet.named_weights())):
        if parameter not in fan_in:  # scale and shift of the stem
            expected = 1.0 if parameter is network.stem[1].weight else 0.0
            assert torch.equal(value, torch.full_like(value, expected))
            continue
        bound = 1 / math.sqrt(fan_in[parameter])
        assert value.abs().max() <= bound
        if value.numel() >= 256:
            seen += 1
            assert value.abs().max() > 0.95 * bound
            # of a uniform variable; five standard errors
            assert value.var().item() == pytest.approx(
                bound**2 / 3, rel=5 * 0.9 / value.numel() ** 0.5
            )
            assert abs(value.mean()) < 5 * bound / (3 * value.numel()) ** 0.5
    assert seen > 100


def test_first_architecture_is_nearly_uniform() -> None:
    supernet = Supernet(CIFAR, SupernetConfig(edge_normalisation=True), seed=0)
    assert supernet.betas is not None
    for parameter in supernet.architecture_parameters():
        assert 0.6e-3 < parameter.std() < 1.5e-3
        assert parameter.abs().max() < 6e-3
    mixing = METHOD.mixing(supernet)
    torch.testing.assert_close(mixing.operations, torch.full((2, 14, 8), 1 / 8), rtol=0, atol=2e-3)


def test_a_seed_decides_all_first_values() -> None:
    first, again, other = (
        Supernet(ODD, CONFIGS["pcdarts-2"], seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in ("weights", "alphas", "betas"))


def test_global_randomness_is_not_touched() -> None:
    before = torch.get_rng_state()
    Supernet(ODD, CONFIGS["darts"], seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 0}, "at least 1, not 0"),
        ({"cells": 2}, "2 cells has no normal cell"),
        ({"partial": 0}, "at least 1"),
        ({"channels": 16, "partial": 3}, "16 is not divisible by 3"),
    ],
)
def test_impossible_sizes_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SupernetConfig(**values)


# ---- architecture parameters ----


@pytest.mark.parametrize("name", ["darts", "pcdarts-4"])
def test_architecture_parameters_are_registered_and_learn(name: str) -> None:
    config = CONFIGS[name]
    supernet = Supernet(ODD, config, seed=0)
    names = {"alphas", "betas"} if config.edge_normalisation else {"alphas"}
    assert {n for n, _ in supernet.named_parameters()} == names | {"weights"}
    assert names <= set(supernet.state_dict())
    supernet.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in supernet.architecture_parameters())
    assert all(isinstance(p, nn.Parameter) for p in supernet.architecture_parameters())

    loss = F.cross_entropy(
        supernet(draw_images(ODD), METHOD.mixing(supernet)), torch.tensor([1, 4])
    )
    loss.backward()
    for parameter in supernet.architecture_parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_softmaxed_betas_of_a_node_sum_to_one() -> None:
    mixing = METHOD.mixing(make(CONFIGS["pcdarts-2"]))
    assert mixing.edges is not None
    for node in range(2, 6):
        incoming = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        assert len(incoming) == node
        sums = mixing.edges[:, incoming].sum(1)
        torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(mixing.operations.sum(-1), torch.ones(2, 14, dtype=torch.float64))


def test_edge_normalisation_multiplies_the_operations() -> None:
    """K = 1 with betas is DARTS with each edge's mixing weights times its beta."""
    supernet = make(CONFIGS["edge-normalised"])
    mixing = METHOD.mixing(supernet)
    assert mixing.edges is not None
    plain = Mixing(mixing.operations * mixing.edges[..., None])
    images = draw_images(ODD)
    assert_equal(supernet(images, mixing), supernet(images, plain))


# ---- discretised ----


@pytest.mark.parametrize("name", ["darts", "half", "pcdarts-2", "pcdarts-4"])
def test_discretised_equals_the_restriction_to_the_genotype(name: str, backend: str) -> None:
    """The modules leave out all other edges, partial channels' bypass and all."""
    supernet = make(CONFIGS[name], backend=backend)
    network = reference_of(supernet)
    mixing = METHOD.mixing(supernet).detach()
    genotype = supernet.derive(mixing)
    images = draw_images(ODD)
    ours = supernet(images, mixing.discretised(genotype))
    assert_equal(ours, network(images, mixing.operations, mixing.edges, genotype))


def test_discretised_computes_nothing_else(backend: str) -> None:
    supernet = make(CONFIGS["darts"], backend=backend)
    mixing = METHOD.mixing(supernet).detach()
    images = draw_images(ODD)
    genotype = supernet.derive(mixing)
    supernet(images, mixing.discretised(genotype)).sum().backward()
    assert supernet.weights.grad is not None
    chosen = {
        (kind, EDGES.index((gene.source, 2 + place // 2)), gene.operation)
        for kind, genes in enumerate((genotype.normal, genotype.reduce))
        for place, gene in enumerate(genes)
    }
    slots = {"sep_conv_3x3": 0, "sep_conv_5x5": 2, "dil_conv_3x3": 4, "dil_conv_5x5": 5}
    gradients = named_like_weights(supernet, supernet.weights.grad)
    for index, plan in enumerate(supernet.plans):
        for edge in range(14):
            for operation, slot in slots.items():
                gradient = gradients[f"cells.{index}.pointwise"][edge, slot]
                wanted = (int(plan.reduction), edge, operation) in chosen
                assert bool((gradient != 0).any()) == wanted


def test_discretised_supernet_is_the_final_network() -> None:
    """With weights copied over; pools are left out, as they are normalised in a search only."""
    supernet = make(SupernetConfig(channels=4, cells=3))
    architecture = DartsSpace().from_genotype(CONVOLUTIONS, Skeleton("cifar", 4, 3))
    network = DartsSpace().network(architecture, ODD, auxiliary=False, generator=generator(0))
    network.double().train()
    copy_into_final(reference_of(supernet), network)
    images = draw_images(ODD)
    mixing = METHOD.mixing(supernet).detach()
    assert_equal(supernet(images, mixing.discretised(CONVOLUTIONS)), network(images))


def copy_into_final(reference: Network, network: nn.Module) -> None:
    """The weights that the genotype keeps, layer by layer in the order of the modules."""
    kept: list[nn.Module] = [reference.stem]
    for cell in reference.cells:
        kept += [cell.preprocess0, cell.preprocess1]
        genes = CONVOLUTIONS.reduce if cell.reduction else CONVOLUTIONS.normal
        for place, gene in enumerate(genes):
            edge = EDGES.index((gene.source, 2 + place // 2))
            kept.append(cell.edges[edge].ops[OPERATIONS.index(gene.operation)])
    kept.append(reference.classifier)

    def layers(modules: list[nn.Module]) -> list[nn.Module]:
        kinds = (nn.Conv2d, nn.Linear)
        return [part for top in modules for part in top.modules() if isinstance(part, kinds)]

    with torch.no_grad():
        for source, target in zip(layers(kept), layers([network]), strict=True):
            for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
                ours.copy_(theirs)
        stem_norm = next(part for part in network.modules() if isinstance(part, nn.BatchNorm2d))
        stem_norm.load_state_dict(reference.stem[1].state_dict())

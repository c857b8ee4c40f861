from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.architecture import Architecture, Skeleton
from nas.data.task import TaskShape
from nas.errors import ConfigurationError
from nas.evaluation import count_macs, count_parameters
from nas.randomness import generator
from nas.spaces.darts import PUBLISHED, DartsSpace, Gene, Genotype
from nas.spaces.darts.network import AuxiliaryHead, Cell, DartsNetwork

SPACE = DartsSpace()
CIFAR = TaskShape(3, 32, 32, 10)
IMAGENET = TaskShape(3, 224, 224, 1000)
SMALL = TaskShape(1, 8, 8, 4)

# Every operation stands in both cells, and in the reduction cell on an edge of stride 2.
EVERYTHING = Genotype(
    normal=(
        Gene("sep_conv_3x3", 0),
        Gene("dil_conv_5x5", 1),
        Gene("max_pool_3x3", 0),
        Gene("skip_connect", 2),
        Gene("avg_pool_3x3", 1),
        Gene("sep_conv_5x5", 3),
        Gene("dil_conv_3x3", 0),
        Gene("skip_connect", 4),
    ),
    reduce=(
        Gene("sep_conv_3x3", 0),
        Gene("skip_connect", 1),
        Gene("max_pool_3x3", 0),
        Gene("sep_conv_5x5", 1),
        Gene("avg_pool_3x3", 0),
        Gene("dil_conv_3x3", 1),
        Gene("dil_conv_5x5", 0),
        Gene("skip_connect", 3),
    ),
)


def random_architecture(seed: int, skeleton: Skeleton) -> Architecture:
    draw = generator(seed, "architecture")
    decisions = {
        name: choices[torch.randint(len(choices), (), generator=draw)]
        for name, choices in SPACE.decisions().items()
    }
    return SPACE.architecture(decisions, skeleton)


def build(
    genotype: Genotype, skeleton: Skeleton, shape: TaskShape, *, auxiliary: bool = False
) -> DartsNetwork:
    architecture = SPACE.from_genotype(genotype, skeleton)
    return SPACE.network(
        architecture, shape, auxiliary=auxiliary, generator=generator(0, "weights")
    )


def draw_images(batch: int, shape: TaskShape, dtype: torch.dtype = torch.float32) -> Tensor:
    size = (batch, shape.channels, shape.height, shape.width)
    return torch.randn(size, generator=generator(0, "images"), dtype=dtype)


# ---- sizes: the published numbers, and a count by formula that knows nothing of the builder ----


@pytest.mark.parametrize(
    ("name", "skeleton", "shape", "parameters", "mega_macs"),
    [
        ("DARTS_V1", Skeleton("cifar", 36, 20), CIFAR, 3_169_414, 501.0),
        ("DARTS_V2", Skeleton("cifar", 36, 20), CIFAR, 3_349_342, 528.4),
        ("DARTS_V1", Skeleton("imagenet", 48, 14), IMAGENET, 4_510_432, 505.9),
        ("DARTS_V2", Skeleton("imagenet", 48, 14), IMAGENET, 4_718_752, 529.9),
    ],
)
def test_published_sizes(name, skeleton, shape, parameters, mega_macs):
    architecture = SPACE.from_genotype(PUBLISHED[name], skeleton)
    network = SPACE.meta_network(architecture, shape, auxiliary=True)
    assert count_parameters(network) == parameters
    assert round(count_macs(network, shape) / 1e6, 1) == mega_macs


def operation_cost(name: str, channels: int, stride: int, pixels: int) -> tuple[int, int]:
    """Parameters and multiply-adds of one operation that puts out ``pixels`` pixels."""
    kind, _, kernel = name.rpartition("_")
    weights = channels * int(kernel[0]) ** 2 + channels**2 if "conv" in kind else 0
    if kind == "sep_conv":
        return 2 * (weights + 2 * channels), 2 * weights * pixels
    if kind == "dil_conv":
        return weights + 2 * channels, weights * pixels
    if name == "skip_connect" and stride == 2:
        return channels**2 + 2 * channels, channels**2 * pixels
    return 0, 0


def expected_cost(genotype: Genotype, skeleton: Skeleton, shape: TaskShape) -> tuple[int, int]:
    def halved(size):
        return -(-size[0] // 2), -(-size[1] // 2)

    c, size, parameters, macs = skeleton.channels, (shape.height, shape.width), 0, 0
    if skeleton.stem == "cifar":
        stems, wide = [(shape.channels, 3 * c, size)], 3 * c
        older = size
    else:
        half, older = halved(size), halved(halved(size))
        size, wide = halved(older), c
        stems = [(shape.channels, c // 2, half), (c // 2, c, older), (c, c, size)]
    for inputs, outputs, (height, width) in stems:
        parameters += 9 * inputs * outputs + 2 * outputs
        macs += 9 * inputs * outputs * height * width
    before = [wide, wide]
    for place in range(skeleton.cells):
        reduction = place in (skeleton.cells // 3, 2 * skeleton.cells // 3)
        c *= 2 if reduction else 1
        # Both inputs are brought to c channels at the newer one's resolution.
        parameters += sum(before) * c + 4 * c
        macs += sum(before) * c * size[0] * size[1]
        output = halved(size) if reduction else size
        for gene in genotype.reduce if reduction else genotype.normal:
            stride = 2 if reduction and gene.source < 2 else 1
            cost = operation_cost(gene.operation, c, stride, output[0] * output[1])
            parameters, macs = parameters + cost[0], macs + cost[1]
        before, size = [before[1], 4 * c], output
    head = before[1] * shape.classes
    return parameters + head + shape.classes, macs + head


CASES = [
    (SPACE.from_genotype(genotype, skeleton), shape)
    for genotype in PUBLISHED.values()
    for skeleton, shape in (
        (Skeleton("cifar", 36, 20), CIFAR),
        (Skeleton("imagenet", 48, 14), IMAGENET),
    )
] + [
    (random_architecture(seed, Skeleton(stem, 6, 1 + seed)), TaskShape(2, 37 + seed, 20, 7))
    for seed in range(7)
    for stem in ("cifar", "imagenet")
]


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_sizes_agree_with_the_formula(architecture, shape):
    network = SPACE.meta_network(architecture, shape, auxiliary=False)
    expected = expected_cost(SPACE.genotype(architecture), architecture.skeleton, shape)
    assert (count_parameters(network), count_macs(network, shape)) == expected


# ---- numbers: the same weights through a reference that is written operation by operation ----


class Reference:
    """Computes logits from a state dict's values, taken in module order, and plain formulas."""

    def __init__(self, network: nn.Module) -> None:
        values = network.state_dict().items()
        self.values: Iterator[Tensor] = iter(
            [value for name, value in values if "num_batches" not in name]
        )

    def conv(self, x, stride=1, padding=0, dilation=1):
        weight = next(self.values)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def norm(self, x):
        scale, shift, mean, variance = (next(self.values).reshape(1, -1, 1, 1) for _ in range(4))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def reduce(self, x):
        height, width = x.shape[2:]
        x = F.pad(x.clamp(min=0), (0, 1, 0, 1))
        even = x[:, :, 0:height:2, 0:width:2]
        odd = x[:, :, 1 : height + 1 : 2, 1 : width + 1 : 2]
        return self.norm(torch.cat([self.conv(even), self.conv(odd)], 1))

    def operation(self, name, x, stride):
        if name == "skip_connect":
            return x if stride == 1 else self.reduce(x)
        if "pool" in name:
            empty = float("-inf") if name == "max_pool_3x3" else 0.0
            stacked = torch.stack(
                [self.window(x, dy, dx, stride, empty) for dy in range(3) for dx in range(3)]
            )
            if name == "max_pool_3x3":
                return stacked.amax(0)
            inside = torch.stack(
                [
                    self.window(torch.ones_like(x), dy, dx, stride, 0.0)
                    for dy in range(3)
                    for dx in range(3)
                ]
            )
            return stacked.sum(0) / inside.sum(0)
        kernel = int(name[-1])
        dilation = 2 if name.startswith("dil") else 1
        for step in range(1 if dilation == 2 else 2):
            x = self.conv(
                x.clamp(min=0), stride if step == 0 else 1, dilation * (kernel - 1) // 2, dilation
            )
            x = self.norm(self.conv(x))
        return x

    @staticmethod
    def window(x, dy, dx, stride, empty):
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1), value=empty)
        return padded[:, :, dy : dy + height : stride, dx : dx + width : stride]

    def cell(self, genes, s0, s1, reduction, halve):
        states = [self.reduce(s0) if halve else self.norm(self.conv(s0.clamp(min=0)))]
        states.append(self.norm(self.conv(s1.clamp(min=0))))
        for index in range(0, 8, 2):
            states.append(
                sum(
                    self.operation(
                        gene.operation,
                        states[gene.source],
                        2 if reduction and gene.source < 2 else 1,
                    )
                    for gene in genes[index : index + 2]
                )
            )
        return torch.cat(states[2:], 1)

    def logits(self, x, genotype, skeleton):
        if skeleton.stem == "cifar":
            s0 = s1 = self.norm(self.conv(x, padding=1))
        else:
            s0 = self.norm(self.conv(x, 2, 1)).clamp(min=0)
            s0 = self.norm(self.conv(s0, 2, 1))
            s1 = self.norm(self.conv(s0.clamp(min=0), 2, 1))
        halve = skeleton.stem == "imagenet"
        for place in range(skeleton.cells):
            reduction = place in (skeleton.cells // 3, 2 * skeleton.cells // 3)
            genes = genotype.reduce if reduction else genotype.normal
            s0, s1, halve = s1, self.cell(genes, s0, s1, reduction, halve), reduction
        return s1.mean((2, 3)) @ next(self.values).T + next(self.values)


@pytest.mark.parametrize(
    ("skeleton", "shape"),
    [
        (Skeleton("cifar", 4, 5), TaskShape(3, 7, 9, 5)),
        (Skeleton("cifar", 4, 2), TaskShape(1, 8, 8, 3)),
        (Skeleton("imagenet", 4, 3), TaskShape(3, 45, 64, 5)),
    ],
)
def test_logits_equal_the_reference(skeleton, shape):
    network = build(EVERYTHING, skeleton, shape).double().eval()
    draw = generator(1, "statistics")
    for value in network.state_dict().values():
        if value.ndim == 1 and value.is_floating_point():  # scales, shifts, running statistics
            value.uniform_(0.5, 1.5, generator=draw)
    images = draw_images(3, shape, torch.float64)
    reference = Reference(network)
    expected = reference.logits(images, EVERYTHING, skeleton)
    assert next(reference.values, None) is None, "every weight is used"
    assert expected.std() > 1e-3
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


# ---- shapes, weights, auxiliary head, drop-path, export ----


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("cells", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [(4, 4), (8, 8), (7, 9)])
def test_any_depth_and_small_images(stem, cells, side):
    shape = TaskShape(1, *side, 3)
    network = build(EVERYTHING, Skeleton(stem, 2, cells), shape, auxiliary=True)
    images = draw_images(2, shape)
    logits, auxiliary = network.forward_with_auxiliary(images)
    assert logits.shape == (2, 3)
    assert auxiliary is not None
    assert auxiliary.shape == (2, 3)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.eval()(images[:1]).shape == (1, 3)


def test_reductions_stand_at_a_third_and_two_thirds():
    network = build(EVERYTHING, Skeleton("cifar", 4, 20), SMALL)
    sizes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    network.eval()(draw_images(1, SMALL))
    assert sizes == [(16, 8, 8)] * 6 + [(32, 4, 4)] * 7 + [(64, 2, 2)] * 7


def test_weights_depend_on_the_generator_alone():
    skeleton = Skeleton("cifar", 4, 3)
    torch.manual_seed(1)
    first = build(EVERYTHING, skeleton, SMALL)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(EVERYTHING, skeleton, SMALL, auxiliary=True)
    assert torch.equal(torch.get_rng_state(), state)
    twin = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, twin[name]), name
    extra = set(twin) - set(first.state_dict())
    assert extra
    assert all(name.startswith("auxiliary_head.") for name in extra)


def test_the_auxiliary_head_changes_nothing_else():
    skeleton = Skeleton("cifar", 4, 3)
    images = draw_images(4, SMALL)
    plain, helped = (build(EVERYTHING, skeleton, SMALL, auxiliary=on) for on in (False, True))
    assert plain.auxiliary_head is None
    logits, nothing = plain.forward_with_auxiliary(images)
    assert nothing is None
    assert torch.equal(logits, helped.forward_with_auxiliary(images)[0])
    assert torch.equal(logits, helped(images))
    assert count_parameters(plain) == count_parameters(helped)
    assert count_macs(plain, SMALL) == count_macs(helped, SMALL)


@pytest.mark.parametrize(
    ("side", "windows"), [(8, ((0, 5), (3, 8))), (7, ((0, 5), (2, 7))), (4, ((0, 2), (2, 4)))]
)
@pytest.mark.parametrize("last_norm", [True, False])
def test_the_auxiliary_head_pools_to_2x2(side, windows, last_norm):
    head = AuxiliaryHead(6, 3, last_norm=last_norm).double().eval()
    state = torch.randn(2, 6, side, side, generator=generator(0), dtype=torch.float64)
    positive = state.clamp(min=0)
    pooled = torch.stack(
        [positive[:, :, a:b, c:d].mean((2, 3)) for a, b in windows for c, d in windows], dim=-1
    )
    unit = (1 + 1e-5) ** -0.5  # a fresh batch norm in evaluation mode
    first, second = head.features[0].weight[:, :, 0, 0], head.features[3].weight.flatten(2)
    hidden = torch.einsum("oi,bik->bok", first, pooled).clamp(min=0) * unit
    hidden = torch.einsum("oik,bik->bo", second, hidden).clamp(min=0) * (unit if last_norm else 1)
    expected = hidden @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(state), expected)


def test_published_auxiliary_heads():
    def size(skeleton, shape):
        architecture = SPACE.from_genotype(PUBLISHED["DARTS_V2"], skeleton)
        head = SPACE.meta_network(architecture, shape, auxiliary=True).auxiliary_head
        return sum(weight.numel() for weight in head.parameters())

    fixed = 128 * 2 + 768 * 128 * 4
    cifar = size(Skeleton("cifar", 36, 20), CIFAR)
    assert cifar == fixed + 36 * 16 * 128 + 768 * 2 + 769 * 10
    imagenet = size(Skeleton("imagenet", 48, 14), IMAGENET)
    assert imagenet == fixed + 48 * 16 * 128 + 769 * 1000


def test_drop_path_scales_operations_but_never_identities():
    cell = Cell(EVERYTHING.normal, (3, 3), 2, reduction=False, reduction_before=False).eval()
    state = draw_images(2, TaskShape(3, 5, 5, 1))
    keep = torch.zeros(8, 2, 1, 1, 1)
    keep[:, 1] = 2.0  # the first image loses every path, the second doubles them
    _, skipped, _, _ = cell(state, state, keep).chunk(4, dim=1)
    plain = [node[1] for node in cell(state, state, None).chunk(4, dim=1)]
    dropped = [node[1] for node in cell(state, state, keep).chunk(4, dim=1)]
    # Node 2 of the first image lost both operations, and the skip of node 3 hands on its zeros.
    first = cell(state, state, keep)[0]
    assert torch.equal(first, torch.zeros_like(first))
    assert torch.equal(skipped[0], torch.zeros_like(skipped[0]))
    torch.testing.assert_close(dropped[0], 2 * plain[0])
    # Node 3 is max_pool(s0) + skip(node 2): the pool doubles, the doubled node 2 passes as it is.
    torch.testing.assert_close(dropped[1], 2 * (plain[1] - plain[0]) + dropped[0])


def test_drop_path_keeps_identities_of_a_cell_of_skips():
    genes = tuple(Gene("skip_connect", source) for _ in range(4) for source in (0, 1))
    cell = Cell(genes, (3, 3), 2, reduction=False, reduction_before=False).eval()
    state = draw_images(2, TaskShape(3, 5, 5, 1))
    assert torch.equal(cell(state, state, torch.zeros(8, 2, 1, 1, 1)), cell(state, state, None))


def paths(network: DartsNetwork, images: Tensor) -> Tensor:
    """The factors that one training pass gives its cells: [cells, 8, B]."""
    seen: list[Tensor] = []
    handles = [
        cell.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].flatten(1)))
        for cell in network.cells
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_drop_path_factors():
    network = build(EVERYTHING, Skeleton("cifar", 2, 4), SMALL)
    images = draw_images(128, SMALL)
    network.drop_path_probability = 0.2
    network.drop_path_generator = generator(0, "paths")
    factors = paths(network, images)
    assert factors.shape == (4, 8, 128)
    assert factors.unique().tolist() == pytest.approx([0, 1.25])
    # 4,096 draws: the share of dropped paths has a standard error of 0.006.
    assert (factors == 0).float().mean().item() == pytest.approx(0.2, abs=0.025)
    assert not torch.equal(factors, paths(network, images)), "every batch draws anew"
    network.drop_path_generator = generator(0, "paths")
    assert torch.equal(factors, paths(network, images))


def test_drop_path_is_for_training_and_needs_a_generator():
    network = build(EVERYTHING, Skeleton("cifar", 2, 3), SMALL)
    images = draw_images(2, SMALL)
    expected = network.eval()(images)
    network.drop_path_probability = 0.3
    assert torch.equal(network(images), expected)
    with pytest.raises(ConfigurationError, match=r"0\.3 needs a drop_path_generator"):
        network.train()(images)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_export_with_any_batch_size(stem):
    shape = TaskShape(3, 9, 8, 4)
    network = build(EVERYTHING, Skeleton(stem, 2, 3), shape, auxiliary=True).eval()
    network.drop_path_generator = generator(0, "paths")
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        network, (draw_images(2, shape),), dynamic_shapes=({0: batch},)
    ).module()
    for size in (1, 2, 7):
        images = draw_images(size, shape)
        torch.testing.assert_close(program(images), network(images))

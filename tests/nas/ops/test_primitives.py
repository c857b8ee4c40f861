from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nas.ops.primitives import PRIMITIVES, FactorizedReduce, initialise
from nas.randomness import generator
from nas.spaces.darts import OPERATIONS


def images(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=generator(seed, "images"), dtype=torch.float64)


def test_every_operation_but_none_has_a_primitive():
    assert tuple(PRIMITIVES) == OPERATIONS[1:]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_sizes_and_an_untouched_input(name, stride, size):
    operation = PRIMITIVES[name](4, stride).double()
    state = images(3, 4, *size)
    before = state.clone()
    output = operation(state)
    assert output.shape == (3, 4, *(-(-side // stride) for side in size))
    assert torch.equal(state, before)


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (4, 1)])
def test_factorized_reduce_reads_even_and_odd_pixels(size):
    layer = FactorizedReduce(3, 4).double().eval()
    state = images(2, 3, *size)
    padded = torch.zeros(2, 3, size[0] + size[0] % 2, size[1] + size[1] % 2, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = state.clamp(min=0)
    even, odd = padded[:, :, ::2, ::2], padded[:, :, 1::2, 1::2]
    expected = torch.cat(
        [
            torch.einsum("oi,bihw->bohw", layer.conv1.weight[:, :, 0, 0], even),
            torch.einsum("oi,bihw->bohw", layer.conv2.weight[:, :, 0, 0], odd),
        ],
        dim=1,
    )
    torch.testing.assert_close(layer(state), expected / (1 + 1e-5) ** 0.5)


def test_average_pool_leaves_padding_out():
    state = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert torch.equal(PRIMITIVES["avg_pool_3x3"](1, 1)(state), state)


@pytest.mark.parametrize(
    ("name", "reach"),
    [("sep_conv_3x3", 2), ("sep_conv_5x5", 4), ("dil_conv_3x3", 2), ("dil_conv_5x5", 4)],
)
def test_how_far_a_convolution_sees(name, reach):
    operation = PRIMITIVES[name](2, 1).double().eval()
    for weight in operation.parameters():
        nn.init.constant_(weight, 0.5)
    state = torch.ones(1, 2, 15, 15, dtype=torch.float64, requires_grad=True)
    operation(state)[0, 0, 7, 7].backward()
    assert state.grad is not None
    seen = state.grad[0, 0].nonzero()
    assert seen.min() == 7 - reach
    assert seen.max() == 7 + reach
    taps = {"sep_conv_3x3": 25, "sep_conv_5x5": 81, "dil_conv_3x3": 9, "dil_conv_5x5": 25}
    assert len(seen) == taps[name]


def block() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 400)
        )


def test_initialise_draws_torchs_default_distributions():
    conv, norm, _, linear = initialise(block(), generator(0, "weights"))
    for layer, fan_in in ((conv, 3 * 9), (linear, 8)):
        bound = fan_in**-0.5
        for weight in (layer.weight, layer.bias):
            assert weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.95 * bound
        assert abs(layer.weight.std() / (bound / 3**0.5) - 1) < 0.1
        assert abs(layer.weight.mean()) < 0.1 * bound
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert torch.equal(norm.running_var, torch.ones(8))
    assert norm.num_batches_tracked == 0


def test_initialise_depends_on_its_generator_and_on_nothing_else():
    torch.manual_seed(1)
    first = initialise(block(), generator(0, "weights")).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = initialise(block(), generator(0, "weights")).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = initialise(block(), generator(1, "weights")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_initialise_refuses_a_layer_it_does_not_know():
    with torch.device("meta"):
        layer = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="LayerNorm"):
        initialise(layer, generator(0))

"""The native stem against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from native_cells import assert_close, same_bits
from native_stems import draw, run
from torch import Tensor

from nas.errors import NativeError
from nas.ops import native, stem
from nas.ops.mixed import Statistics

pytestmark = pytest.mark.usefixtures("native")


def both(values: dict[str, Tensor], **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return run(native.stem, values, **settings), run(stem.stem, values, **settings)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 20),
    inputs=st.sampled_from([1, 2, 3, 5, 16]),
    outputs=st.sampled_from([3, 6, 16, 24, 48, 81]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    training=st.booleans(),
    update=st.booleans(),
)
def test_the_stem_is_that_of_eager(
    images: int, inputs: int, outputs: int, size: tuple[int, int], training: bool, update: bool
) -> None:
    assume(not training or images * size[0] * size[1] > 1)
    values = draw(images, inputs, outputs, size)
    ours, theirs = both(values, training=training, update=update)
    assert_close(ours, theirs)
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)


def test_single_precision_is_as_good_as_that_of_eager() -> None:
    values = draw(8, 3, 48, (16, 16))
    exact = run(stem.stem, values)
    single = {name: value.float() for name, value in values.items()}
    ours, theirs = both(single)
    for name, value in ours.items():
        error, limit = ((x.double() - exact[name]).norm() for x in (value, theirs[name]))
        assert error <= 2 * limit + 1e-6 * exact[name].norm(), name


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_a_rounded_result(training: bool) -> None:
    """And everything before it is in single precision, as the gradients are."""
    values = {name: value.float() for name, value in draw(4, 3, 20, (7, 5)).items()}
    values["gradient"] = values["gradient"].bfloat16().float()
    whole = run(native.stem, values, training=training)
    half = run(native.stem, values, training=training, stored=torch.bfloat16)
    assert half["output"].dtype == torch.bfloat16
    assert torch.equal(half["output"], whole["output"].bfloat16())
    assert all(torch.equal(half[name], whole[name]) for name in ("weights", "mean", "variance"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_matter() -> None:
    values = {name: value.float() for name, value in draw(37, 3, 48, (6, 5)).items()}
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(native.stem, values))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_gradients_are_the_finite_differences() -> None:
    values = draw(2, 2, 3, (3, 4))
    weights = values["weights"].requires_grad_()
    for training in (True, False):
        statistics = Statistics(values["mean"], values["variance"], training, update=False)
        torch.autograd.gradcheck(
            lambda w, s=statistics: native.stem(values["images"], w, s, torch.float64), weights
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_eager(value: float) -> None:
    values = draw(3, 3, 5, (6, 7))
    values["images"][1, 2, 3, 4] = value
    for training in (True, False):
        ours, theirs = both(values, training=training)
        for name in ("output", "mean", "variance"):
            assert torch.equal(ours[name].isfinite(), theirs[name].isfinite()), name


def test_images_that_need_a_gradient_get_one() -> None:
    values = draw(2, 3, 6, (5, 4))
    gradients = []
    for twin in (native.stem, stem.stem):
        images = values["images"].clone().requires_grad_()
        statistics = Statistics(values["mean"].clone(), values["variance"].clone(), training=True)
        output = twin(images, values["weights"], statistics, torch.float64)
        gradients += torch.autograd.grad(output, images, values["gradient"])
    assert torch.equal(*gradients)


def arguments(values: dict[str, Tensor]) -> tuple[Any, ...]:
    images = values["images"].contiguous(memory_format=torch.channels_last)
    return images, values["weights"], values["mean"], values["variance"], False, True


def test_operators_are_registered_as_pytorch_wants() -> None:
    values = draw(2, 3, 5, (4, 3))
    forward, backward = torch.ops.nas_transfer.stem, torch.ops.nas_transfer.stem_backward
    given = arguments(values)
    _, mean, deviation, _, convolution = forward(*given)
    images, weights = given[:2]
    gradient = values["gradient"].contiguous(memory_format=torch.channels_last)
    weights.requires_grad_()
    torch.library.opcheck(forward, given)
    back = (gradient, images, weights.detach(), mean, deviation, convolution, True)
    torch.library.opcheck(backward, back)


def test_second_derivatives_are_refused() -> None:
    values = draw(2, 3, 5, (4, 3))
    weights = values["weights"].requires_grad_()
    output = torch.ops.nas_transfer.stem(*arguments(values))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), weights, create_graph=True)
    with pytest.raises(NativeError, match="first derivatives only"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x.float(), "images must be Double as `weights` is, not Float"),
        (0, lambda x: x.contiguous(), "images must be contiguous in channels-last format"),
        (0, lambda x: x[:0], "images is empty"),
        (1, lambda x: x[1:], r"weights must be \[\d+\], not \[\d+\]"),
        (1, lambda x: x.half(), "weights must be float32 or float64, not Half"),
        (2, lambda x: x.float(), "running_mean must be Double"),
        (3, lambda x: x[1:].clone(), r"running_variance must be \[5\], not \[4\]"),
        (4, lambda _: True, "half an output goes with float32 weights, not with Double"),
    ],
)
def test_wrong_arguments_are_named(place: int, change: Callable[[Any], Any], message: str) -> None:
    given = list(arguments(draw(2, 3, 5, (4, 3))))
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nas_transfer.stem(*given)


def test_one_value_per_channel_has_no_variance() -> None:
    values = draw(1, 3, 5, (1, 1))
    with pytest.raises(RuntimeError, match="more than one value per channel"):
        run(native.stem, values)
    assert_close(*both(values, training=False))

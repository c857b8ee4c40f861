from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from nas import optimisation
from nas.errors import CheckpointError
from nas.optimisation import (
    copy_tensors,
    cosine,
    flat_sgd,
    pack_optimiser,
    restore_optimiser,
    set_learning_rate,
    with_prefix,
    without_prefix,
)


def test_cosine_equals_the_scheduler_of_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = SGD([parameter], lr=0.025)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 50, eta_min=0.001)
    for epoch in range(50):
        rate = optimiser.param_groups[0]["lr"]
        assert cosine(0.025, 0.001, epoch, 50) == pytest.approx(rate, rel=1e-12)
        optimiser.step()
        scheduler.step()


def test_cosine_end_points() -> None:
    assert cosine(0.1, 0.02, 0, 10) == 0.1
    assert cosine(0.1, 0.02, 5, 10) == pytest.approx(0.06)
    assert cosine(0.1, 0.02, 10, 10) == pytest.approx(0.02)
    assert cosine(1.0, 0.0, 1, 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


def test_every_group_gets_the_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(3)]
    optimiser = SGD(groups, lr=1.0)
    set_learning_rate(optimiser, 0.25)
    assert [group["lr"] for group in optimiser.param_groups] == [0.25] * 3


def test_a_rate_that_is_a_tensor_changes_where_it_lies() -> None:
    """A captured step reads it there; and each rate is that of PyTorch's plain SGD."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 37, dtype=torch.float64)) for _ in range(2))
    rate = torch.tensor(1.0, dtype=torch.float64)
    optimiser = SGD([ours], lr=rate, momentum=0.9, weight_decay=3e-4, fused=True)
    plain = SGD([theirs], lr=1.0, momentum=0.9, weight_decay=3e-4)
    for value in (0.5, 0.25, 0.125):
        set_learning_rate(optimiser, value)
        set_learning_rate(plain, value)
        assert optimiser.param_groups[0]["lr"] is rate
        for parameter in (ours, theirs):
            parameter.grad = torch.sin(3 * parameter.detach())
        optimiser.step()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_flat_sgd_has_its_rate_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}
    monkeypatch.setattr(optimisation, "SGD", lambda _, **settings: made.update(settings))
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda x, device: ("on", device.type, tensor(x)))
    vector = torch.zeros(3)
    flat_sgd(vector, torch.device(device), rate=0.5, momentum=0.9, weight_decay=3e-4)
    assert made["lr"] == (("on", "cuda", 0.5) if device == "cuda" else 0.5)
    assert made["fused"] == (device != "meta")


def make(kind: str) -> tuple[list[nn.Parameter], Optimizer]:
    parameters = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)]
    if kind == "adam":
        return parameters, Adam(parameters, lr=0.1, betas=(0.5, 0.999), weight_decay=1e-3)
    return parameters, SGD(parameters, lr=0.1, momentum=0.9, weight_decay=3e-4)


def steps(parameters: list[nn.Parameter], optimiser: Optimizer, numbers: range) -> None:
    for number in numbers:
        for parameter in parameters:
            parameter.grad = torch.sin(parameter.detach() * (number + 1))
        optimiser.step()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_restored_optimiser_goes_on_with_the_same_bits(kind: str, done: int) -> None:
    parameters, optimiser = make(kind)
    steps(parameters, optimiser, range(done))
    state = {name: t.clone() for name, t in pack_optimiser("o", optimiser).items()}
    values = [parameter.detach().clone() for parameter in parameters]
    steps(parameters, optimiser, range(done, 6))

    others, other = make(kind)
    with torch.no_grad():
        for parameter, value in zip(others, values, strict=True):
            parameter.copy_(value)
    restore_optimiser("o", other, state)
    steps(others, other, range(done, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_restored_state_is_a_copy() -> None:
    parameters, optimiser = make("sgd")
    steps(parameters, optimiser, range(1))
    state = pack_optimiser("o", optimiser)
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    others, other = make("sgd")
    restore_optimiser("o", other, frozen)
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    steps(others, other, range(2))
    assert all(torch.equal(frozen[name], before[name]) for name in frozen)


def test_states_that_do_not_fit_are_refused() -> None:
    _, optimiser = make("sgd")
    with pytest.raises(CheckpointError, match=r"'o\.2\.momentum_buffer' too many"):
        restore_optimiser("o", optimiser, {"o.2.momentum_buffer": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"shape \(4,\), but \(3,\) is wanted"):
        restore_optimiser("o", optimiser, {"o.0.momentum_buffer": torch.zeros(4)})


def test_copying_checks_names_and_shapes() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="checkpoint of this thing lacks the tensor 'b'"):
        copy_tensors(target, {"a": torch.ones(2)}, "this thing")
    with pytest.raises(CheckpointError, match=r"'b' of shape \(4,\), but \(3,\) is wanted"):
        copy_tensors(target, {"a": torch.ones(2), "b": torch.ones(4)}, "this thing")
    copy_tensors(target, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "this")
    assert target["b"].tolist() == [1, 1, 1]


def test_prefixes_are_there_and_back_again() -> None:
    tensors = {"a.b": torch.zeros(1), "c": torch.ones(1)}
    both = {**with_prefix("x", tensors), **with_prefix("xy", {"d": torch.zeros(2)})}
    assert set(both) == {"x.a.b", "x.c", "xy.d"}
    assert without_prefix("x", both) == tensors

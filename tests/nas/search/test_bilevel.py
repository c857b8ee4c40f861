"""The loop that all differentiable searches share: what each level learns from, hooks, resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from searches import Listener, exact, in_double, make_search, outcome, pair
from torch import Tensor

from nas.data import ImageTask, TensorImages, halves, load_task
from nas.errors import ConfigurationError, NonFiniteLossError
from nas.search import METHODS, BilevelSearch, Method, SearchConfig
from nas.spaces.darts import PUBLISHED, derive
from nas.spaces.darts.supernet import Mixing, Supernet, SupernetConfig


def fail(gradient: Tensor) -> Tensor:
    raise AssertionError("a gradient that nobody asked for")


# ---- the two levels ----


def test_first_order_is_the_validation_gradient_at_todays_weights(few_digits: ImageTask) -> None:
    search = in_double(make_search(few_digits, "pcdarts"))
    train, validation = pair(search)
    supernet = search.supernet
    scores = supernet(validation.images, search.method.mixing(supernet), update_statistics=False)
    expected = torch.autograd.grad(
        F.cross_entropy(scores, validation.labels), [supernet.alphas, supernet.betas]
    )
    ours = search.method.architecture_gradients(search, train, validation)
    assert len(ours) == 2
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
        assert theirs.any()


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_architecture_step_asks_for_no_weight_gradient(method: str, few_digits: ImageTask) -> None:
    search = make_search(few_digits, method)
    train, validation = pair(search)
    search.supernet.weights.register_hook(fail)
    before = exact(search.supernet.weights)
    architecture = [exact(p) for p in search.supernet.architecture_parameters()]
    search.architecture_step(train, validation)
    assert search.supernet.weights.grad is None
    assert exact(search.supernet.weights) == before
    after = [exact(p) for p in search.supernet.architecture_parameters()]
    assert all(old != new for old, new in zip(architecture, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_weight_step_asks_for_no_architecture_gradient(method: str, few_digits: ImageTask) -> None:
    search = make_search(few_digits, method)
    train, _ = pair(search)
    for parameter in search.supernet.architecture_parameters():
        parameter.register_hook(fail)
    before = exact(search.supernet.weights)
    architecture = [exact(p) for p in search.supernet.architecture_parameters()]
    search.weight_step(train)
    assert exact(search.supernet.weights) != before
    assert [exact(p) for p in search.supernet.architecture_parameters()] == architecture
    assert all(p.grad is None for p in search.supernet.architecture_parameters())


def test_weight_step_is_clipped_sgd(few_digits: ImageTask) -> None:
    """Two steps by the formula: clip to the norm, decay, momentum, rate."""
    search = in_double(make_search(few_digits, gradient_clip=0.5, weight_decay=0.01))
    config, weights = search.config, search.supernet.weights
    train, _ = pair(search)
    expected, momentum = weights.detach().clone(), torch.zeros_like(weights)
    for _ in range(2):
        mixing = search.method.mixing(search.supernet)
        scores = search.supernet(train.images, mixing, update_statistics=False)
        (gradient,) = torch.autograd.grad(F.cross_entropy(scores, train.labels), [weights])
        assert gradient.norm() > 0.5
        gradient = gradient * 0.5 / gradient.norm() + 0.01 * expected
        momentum = 0.9 * momentum + gradient
        expected = expected - config.learning_rate * momentum
        search.weight_step(train)
        torch.testing.assert_close(weights.detach(), expected, rtol=1e-5, atol=1e-7)


def test_the_levels_learn_from_disjoint_halves(few_digits: ImageTask) -> None:
    search = make_search(few_digits)
    first, second = halves(few_digits, 0)
    (source,) = search.sources.each
    sizes = source.train.images_per_epoch, source.validation.images_per_epoch
    assert not set(first.tolist()) & set(second.tolist())
    assert not set(torch.cat([first, second]).tolist()) & set(few_digits.splits.test.tolist())
    assert sizes == (len(first) // 40 * 40, len(second) // 40 * 40)
    train, validation = pair(search)
    assert not torch.equal(train.images, validation.images)


def test_learning_rate_is_half_a_cosine(few_digits: ImageTask) -> None:
    search = make_search(few_digits, epochs=4, learning_rate=0.1, learning_rate_end=0.02)
    rates = []
    for search.epoch in range(4):
        search.batches()
        rates.append(search.weight_optimiser.param_groups[0]["lr"])
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.1, 0.06 + 0.04 * half, 0.06, 0.06 - 0.04 * half])


@pytest.mark.parametrize(
    ("epochs", "warmup", "batch"), [(0, 0, 8), (2, 2, 8), (2, -1, 8), (2, 0, 1)]
)
def test_impossible_settings_are_refused(epochs: int, warmup: int, batch: int) -> None:
    with pytest.raises(ConfigurationError):
        SearchConfig(epochs=epochs, warmup_epochs=warmup, batch_size=batch)


def test_warmup_freezes_the_architecture(few_digits: ImageTask) -> None:
    search = make_search(few_digits, "pcdarts", epochs=3, warmup_epochs=2)
    before = [exact(p) for p in search.supernet.architecture_parameters()]
    seen: list[bool] = []

    class Watch(Listener):
        def on_epoch(self, record: object) -> None:
            now = [exact(p) for p in search.supernet.architecture_parameters()]
            seen.append(now == before)

    history = search.run(observer=Watch()).mixing_history
    assert seen == [True, True, False]
    assert torch.equal(history[0], history[1])
    assert not torch.equal(history[1], history[2])


# ---- hooks ----


class Tilted(Method):
    """Weights learn under other mixing weights, and skips are punished in the architecture step."""

    name = "tilted"

    def __init__(self, strength: float, tilt: float) -> None:
        self.strength, self.tilt = strength, tilt
        self.ended: list[int] = []

    def weight_mixing(self, search: BilevelSearch) -> Mixing:
        mixing = self.mixing(search.supernet)
        return replace(mixing, operations=mixing.operations * self.tilt)

    def penalty(self, search: BilevelSearch) -> Tensor | None:
        return self.strength * search.supernet.alphas[..., 3].square().sum()

    def between_epochs(self, search: BilevelSearch, epoch: int) -> None:
        self.ended.append(epoch)


def test_penalty_adds_its_own_gradient(few_digits: ImageTask) -> None:
    plain = in_double(make_search(few_digits, Tilted(0.0, 1.0)))
    punished = in_double(make_search(few_digits, Tilted(2.5, 1.0)))
    (without,) = plain.method.architecture_gradients(plain, *pair(plain))
    (with_it,) = punished.method.architecture_gradients(punished, *pair(punished))
    expected = torch.zeros_like(without)
    expected[..., 3] = 2 * 2.5 * punished.supernet.alphas.detach()[..., 3]
    torch.testing.assert_close(with_it - without, expected, rtol=1e-10, atol=1e-14)


def test_weight_mixing_changes_the_weight_step_only(few_digits: ImageTask) -> None:
    plain, tilted = (make_search(few_digits, Tilted(0.0, tilt)) for tilt in (1.0, 0.5))
    gradients = [s.method.architecture_gradients(s, *pair(s))[0] for s in (plain, tilted)]
    assert torch.equal(*gradients)
    for search in (plain, tilted):
        search.weight_step(pair(search)[0])
    assert not torch.equal(plain.supernet.weights, tilted.supernet.weights)


def test_between_epochs_is_called_after_each(few_digits: ImageTask) -> None:
    method = Tilted(0.0, 1.0)
    make_search(few_digits, method).run()
    assert method.ended == [0, 1]


# ---- what it reports ----


def test_records_and_events(few_digits: ImageTask) -> None:
    listener = Listener()
    search = make_search(few_digits, "pcdarts")
    result = search.run(observer=listener)
    assert [(e.epoch, e.batch) for e in listener.batches] == [
        (epoch, batch) for epoch in range(2) for batch in range(1, search.steps + 1)
    ]
    assert {(e.phase, e.epochs, e.batches, e.images) for e in listener.batches} == {
        ("search", 2, search.steps, 80)
    }
    # the supernet, then its discretised form
    batches = 2 * len(search.sources.each[0].evaluation)
    assert [(e.phase, e.epoch, e.batch, e.batches, e.images) for e in listener.validations] == [
        ("validation", epoch, batch, batches, 40)
        for epoch in range(2)
        for batch in range(1, batches + 1)
    ]
    for record in result.records:
        mixed, discretised = (
            listener.validations[batches * record.epoch + last].accuracy
            for last in (batches // 2 - 1, batches - 1)
        )
        assert mixed == record.metrics["supernet/val_accuracy"]
        assert discretised == record.metrics["supernet/discretised_accuracy"]
    assert listener.epochs == list(result.records)
    for record in result.records:
        metrics = record.metrics
        assert set(metrics) == {
            "supernet/train_loss", "supernet/train_accuracy", "supernet/val_loss",
            "supernet/val_accuracy", "supernet/discretised_accuracy", "supernet/discretised_gap",
            "alpha/entropy_normal", "alpha/entropy_reduce", "skip/normal", "skip/reduce", "lr",
            "genotype/age", "images_per_second", "epoch_seconds", "peak_memory_mb",
        }  # fmt: skip
        assert all(math.isfinite(value) for value in metrics.values())
        gap = metrics["supernet/val_accuracy"] - metrics["supernet/discretised_accuracy"]
        assert metrics["supernet/discretised_gap"] == pytest.approx(gap)
    assert result.mixing_history.shape == (2, 2, 14, 8)
    mixing = search.method.mixing(search.supernet)
    assert torch.equal(result.mixing_history[-1], mixing.operations)
    assert result.genotype == derive(mixing.operations, mixing.edges)


def test_entropy_starts_at_ln_8(few_digits: ImageTask) -> None:
    search = make_search(few_digits, architecture_learning_rate=1e-6, epochs=1)
    metrics = search.run().records[0].metrics
    assert metrics["alpha/entropy_normal"] == pytest.approx(math.log(8), abs=1e-5)


class Chosen(Method):
    """A method whose mixing weights always stand for one genotype."""

    def __init__(self, name: str) -> None:
        self.genotype = PUBLISHED[name]

    def mixing(self, supernet: Supernet) -> Mixing:
        plain = super().mixing(supernet)
        return Mixing(plain.discretised(self.genotype).operations * (1 + supernet.alphas))


def test_collapse_is_warned_of(few_digits: ImageTask) -> None:
    listener = Listener()
    search = make_search(few_digits, Chosen("DARTS_V1"), skip_limit=2, epochs=1)
    result = search.run(observer=listener)
    assert result.genotype == PUBLISHED["DARTS_V1"]  # three skips in its normal cell
    assert [tag for tag, _ in listener.warnings] == ["collapse"]
    assert "3 skip connections after epoch 1, more than 2" in listener.warnings[0][1]
    assert result.records[0].metrics["skip/normal"] == 3


def test_no_collapse_no_warning(few_digits: ImageTask) -> None:
    listener = Listener()
    make_search(few_digits, Chosen("DARTS_V1"), skip_limit=3, epochs=1).run(observer=listener)
    assert listener.warnings == []


def test_a_loss_that_is_not_finite_stops_the_search(few_digits: ImageTask, tmp_path: Path) -> None:
    class Poisoned(Method):
        def between_epochs(self, search: BilevelSearch, epoch: int) -> None:
            with torch.no_grad():
                search.supernet.weights[-1] = math.nan

    with pytest.raises(NonFiniteLossError, match=r"epoch 2, batch 1\b.*lower learning rate"):
        make_search(few_digits, Poisoned()).run(tmp_path / "c")


def test_evaluation_does_not_depend_on_the_order_of_the_set(all_digits: ImageTask) -> None:
    """Folders store their images class by class; batch statistics must not see that."""
    order = all_digits.labels.argsort(stable=True)
    place = order.argsort()
    splits = replace(
        all_digits.splits,
        train=place[all_digits.splits.train].sort().values,
        val=place[all_digits.splits.val].sort().values,
        test=place[all_digits.splits.test].sort().values,
    )
    images = TensorImages(all_digits.images.gather(order))
    by_class = replace(all_digits, images=images, labels=all_digits.labels[order], splits=splits)
    batch = next(make_search(by_class, batch_size=64).sources.each[0].evaluation.epoch())
    assert len(batch.labels.unique()) == 10


def test_evaluation_changes_nothing(few_digits: ImageTask) -> None:
    search = make_search(few_digits, "pcdarts")
    search.weight_step(pair(search)[0])
    before = {name: exact(tensor) for name, tensor in search.tensors().items()}
    mixing = search.method.mixing(search.supernet).detach()
    assert search.accuracy(mixing) == search.accuracy(mixing)
    assert {name: exact(tensor) for name, tensor in search.tensors().items()} == before


def test_the_smallest_images_and_a_last_batch_of_one(few_digits: ImageTask) -> None:
    """4x4 pixels are 1x1 after two reductions: a lone image has no statistics there."""
    small = replace(
        few_digits, images=TensorImages(few_digits.images.gather(torch.arange(200))[..., ::2, ::2])
    )
    half = len(halves(small, 0)[1])
    size = next(size for size in range(16, half) if half % size == 1)
    settings = {"supernet": SupernetConfig(channels=2, cells=3), "epochs": 1, "batch_size": size}
    assert len(make_search(small, **settings).run().records) == 1  # type: ignore[arg-type]


# ---- does it learn ----


def test_a_search_on_real_digits_learns(tmp_path: Path) -> None:
    """Ten classes, so chance is 10 %; 32 steps bring the supernet far above it."""
    digits = load_task("digits", root=tmp_path, limit=700)
    supernet = SupernetConfig(channels=8, cells=3, partial=4, edge_normalisation=True)
    settings = {"epochs": 4, "batch_size": 32, "crop_padding": 0, "warmup_epochs": 3}
    records = make_search(digits, "pcdarts", supernet=supernet, **settings).run().records
    losses = [record.metrics["supernet/train_loss"] for record in records]
    assert records[-1].metrics["supernet/val_accuracy"] > 0.4
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_searches_on_a_gpu(method: str, few_digits: ImageTask, tmp_path: Path) -> None:
    search = make_search(few_digits, method, device=torch.device("cuda"), epochs=1)
    result = search.run(tmp_path / "c")
    assert result.supernet.alphas.is_cuda
    assert math.isfinite(result.records[0].metrics["supernet/val_loss"])
    again = make_search(few_digits, method, device=torch.device("cuda"), epochs=1)
    assert outcome(again.run(tmp_path / "c")) == outcome(result)


# ---- backends ----


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_both_backends_find_the_same_cells(method: str, few_digits: ImageTask) -> None:
    """A whole search in double precision, in which rounding has no time to grow."""
    found = []
    for backend in ("native", "eager"):
        search = in_double(make_search(few_digits, method, backend=backend))
        search.supernet.register_forward_pre_hook(
            lambda _, arguments: (arguments[0].double(), *arguments[1:])
        )
        start = search.supernet.alphas.detach().clone()
        found.append(search.run())
        assert not torch.equal(found[-1].supernet.alphas, start)
    native, eager = found
    assert native.genotype == eager.genotype
    torch.testing.assert_close(native.mixing_history, eager.mixing_history, rtol=1e-8, atol=0)
    torch.testing.assert_close(
        native.supernet.state_dict(), eager.supernet.state_dict(), rtol=1e-6, atol=1e-8
    )

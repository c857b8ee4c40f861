"""The data-set distance, held to closed forms, published conventions and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from sketches import blobs, sketch_of
from torch import Tensor

from nas.errors import ConfigurationError, NASError, UnknownNameError
from nas.transfer.otdd import OTDDConfig, distance, squared_distance
from nas.transfer.otdd.distance import ground_cost
from nas.transfer.otdd.labels import LABEL_DISTANCES, bures_squared

FIRST = torch.tensor([[2, 0.5], [0.5, 1]], dtype=torch.float64)
SECOND = torch.tensor([[1, -0.3], [-0.3, 3]], dtype=torch.float64)


def factor(covariance: Tensor) -> Tensor:
    return torch.linalg.cholesky(covariance).mT


def points_with(mean: Tensor, covariance: Tensor) -> Tensor:
    """Points [2 d, d] of exactly this mean and covariance (divisor n - 1)."""
    d = len(mean)
    steps = factor(covariance) * ((2 * d - 1) / 2) ** 0.5
    return mean + torch.cat([steps, -steps])


def by_roots(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Bures distance as the textbooks write it."""
    root = scipy.linalg.sqrtm(first)
    cross = scipy.linalg.sqrtm(root @ second @ root)
    return float(np.real(np.trace(first + second - 2 * cross)))


class TestBures:
    def test_reference_value_and_not_the_frobenius_shortcut(self) -> None:
        value = float(bures_squared(factor(FIRST), factor(SECOND)))
        assert value == pytest.approx(0.9293118550, abs=1e-10)
        roots = [scipy.linalg.sqrtm(s.numpy()) for s in (FIRST, SECOND)]
        shortcut = float(np.square(roots[0] - roots[1]).sum())
        assert shortcut == pytest.approx(0.9331709372, abs=1e-10)
        assert abs(value - shortcut) > 1e-3

    def test_reference_value_with_means(self) -> None:
        far = torch.tensor([50.0, 50.0], dtype=torch.float64)
        labels = torch.tensor([0] * 4 + [1] * 4)
        zero, mean = torch.zeros(2).double(), torch.tensor([1.0, -2.0], dtype=torch.float64)
        a = sketch_of(torch.cat([points_with(zero, FIRST), points_with(far, FIRST)]), labels)
        b = sketch_of(torch.cat([points_with(mean, SECOND), points_with(far, FIRST)]), labels)
        costs = LABEL_DISTANCES["gaussian"](a, b)
        assert float(costs[0, 0]) == pytest.approx(5.9293118550, abs=1e-9)
        assert float(costs[1, 1]) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("images", [3, 6, 40])  # singular covariances among them
    def test_agrees_with_matrix_roots(self, images: int) -> None:
        features, labels = blobs(1, classes=2, images=images, dimensions=5)
        sketch = sketch_of(features, labels)
        assert sketch.ranks.tolist() == [min(images, 5)] * 2
        covariances = [np.cov(features[labels == k].numpy().T) for k in range(2)]
        value = float(bures_squared(*sketch.class_factors))
        # the root of a singular matrix keeps half of the digits
        assert value == pytest.approx(by_roots(*covariances), rel=1e-6)


class TestConvention:
    @pytest.mark.parametrize("labels", LABEL_DISTANCES)
    def test_a_set_has_no_distance_to_itself(self, labels: str) -> None:
        a = sketch_of(*blobs(0))
        assert distance(a, a, OTDDConfig(labels)) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("labels", LABEL_DISTANCES)
    def test_a_shift_counts_twice(self, labels: str) -> None:
        features, classes = blobs(0)
        shift = torch.tensor([0.3, -1, 2, 0], dtype=torch.float64)
        a, b = sketch_of(features, classes), sketch_of(features + shift, classes)
        squared = 2 * float(shift.square().sum())
        assert squared_distance(a, b, OTDDConfig(labels)) == pytest.approx(squared, rel=1e-9)
        assert distance(a, b, OTDDConfig(labels)) == pytest.approx(squared**0.5, rel=1e-9)

    def test_is_the_cheapest_assignment(self) -> None:
        a, b = (sketch_of(*blobs(seed, classes=2, images=3)) for seed in (1, 2))
        labels = LABEL_DISTANCES["gaussian"](a, b)
        best = min(
            sum(
                float((a.points[i] - b.points[j]).square().sum())
                + float(labels[a.labels[i], b.labels[j]])
                for i, j in enumerate(order)
            )
            / 6
            for order in permutations(range(6))
        )
        assert squared_distance(a, b, OTDDConfig()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("labels", LABEL_DISTANCES)
class TestMetric:
    def test_symmetry(self, labels: str) -> None:
        a, b = sketch_of(*blobs(0)), sketch_of(*blobs(1, classes=2, images=5))
        config = OTDDConfig(labels)
        assert distance(a, b, config) == pytest.approx(distance(b, a, config), rel=1e-9)

    def test_names_of_classes_do_not_matter(self, labels: str) -> None:
        features, classes = blobs(0)
        other = sketch_of(*blobs(1))
        renamed = sketch_of(features, torch.tensor([2, 0, 1])[classes])
        config = OTDDConfig(labels)
        expected = distance(sketch_of(features, classes), other, config)
        assert distance(renamed, other, config) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("seed", range(5))
    def test_triangle_inequality(self, labels: str, seed: int) -> None:
        a, b, c = (
            sketch_of(*blobs(3 * seed + k, classes=2 + k, images=6, dimensions=3)) for k in range(3)
        )
        config = OTDDConfig(labels)
        assert distance(a, c, config) <= distance(a, b, config) + distance(b, c, config) + 1e-9


def test_diagonal_covariances_are_transport_of_longer_vectors() -> None:
    """Papers: with diagonal covariances OTDD is plain W2 of [x, mean, deviations]."""
    a, b = sketch_of(*blobs(0)), sketch_of(*blobs(5))

    def longer(features: Tensor, labels: Tensor) -> np.ndarray:
        rows = []
        for x, label in zip(features, labels, strict=True):
            own = features[labels == label].numpy()
            rows.append(np.concatenate([x.numpy(), own.mean(0), own.std(0, ddof=1)]))
        return np.array(rows)

    x, y = longer(*blobs(0)), longer(*blobs(5))
    costs = np.square(x[:, None] - y[None]).sum(-1)
    rows, columns = scipy.optimize.linear_sum_assignment(costs)
    expected = costs[rows, columns].mean()
    assert squared_distance(a, b, OTDDConfig("diagonal")) == pytest.approx(expected, rel=1e-9)


def test_uneven_points_weigh_as_their_classes_do() -> None:
    features, labels = blobs(0, classes=2, images=6)
    few = torch.cat([features[:6], features[6:8]])
    sketch = sketch_of(few, torch.tensor([0] * 6 + [1] * 2))
    torch.testing.assert_close(sketch.weights, torch.full((8,), 1 / 8, dtype=torch.float64))
    whole = sketch_of(features, labels)
    sampled = replace(whole, counts=torch.tensor([30, 10]))
    assert float(sampled.weights[:6].sum()) == pytest.approx(0.75)


class TestBadInput:
    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'gaussian'"):
            OTDDConfig("gausian")
        with pytest.raises(UnknownNameError, match="unknown outer problem 'lp'"):
            OTDDConfig(outer="lp")

    def test_two_embeddings(self) -> None:
        a = sketch_of(*blobs(0))
        b = replace(a, embedding="another")
        with pytest.raises(ConfigurationError, match="different embeddings"):
            distance(a, b)


class TestEntropic:
    def test_becomes_exact_as_the_regularisation_goes(self) -> None:
        """From above, and no further off than epsilon log n: a plan's KL is at most that."""
        a, b = sketch_of(*blobs(0)), sketch_of(*blobs(1))
        exact, mean = squared_distance(a, b, OTDDConfig()), ground_cost(a, b, "gaussian").mean()
        shares = (1, 0.3, 0.1, 0.03, 0.01)
        configs = [OTDDConfig(outer="entropic", regularisation=s, debiased=False) for s in shares]
        errors = [squared_distance(a, b, config) - exact for config in configs]
        assert errors == sorted(errors, reverse=True)
        for share, error in zip(shares, errors, strict=True):
            assert 0 < error <= share * float(mean) * np.log(24)

    def test_its_value_is_the_primal_one(self) -> None:
        """<P, C> + epsilon KL(P | a b) of a plan by plain Sinkhorn."""
        a, b = sketch_of(*blobs(0)), sketch_of(*blobs(1))
        cost = ground_cost(a, b, "means").numpy()
        epsilon = 0.3 * cost.mean()
        kernel, u, v = np.exp(-cost / epsilon), np.ones(24), np.ones(24)
        for _ in range(5000):
            u = 1 / 24 / (kernel @ v)
            v = 1 / 24 / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        expected = (plan * cost).sum() + epsilon * (plan * np.log(plan * 24 * 24)).sum()
        config = OTDDConfig("means", "entropic", 0.3, debiased=False)
        assert squared_distance(a, b, config) == pytest.approx(expected, rel=1e-6)

    def test_debiased(self) -> None:
        features, labels = blobs(0)
        a, b = sketch_of(features, labels), sketch_of(features + 1, labels)
        assert distance(a, a, OTDDConfig(outer="entropic")) == pytest.approx(0, abs=1e-6)
        biased = OTDDConfig(outer="entropic", debiased=False)
        assert distance(a, a, biased) > 1
        # the divergence of a shifted copy is the shift, at any regularisation
        config = OTDDConfig(outer="entropic", regularisation=0.5)
        assert squared_distance(a, b, config) == pytest.approx(2 * 4, rel=1e-4)
        assert squared_distance(b, a, config) == pytest.approx(2 * 4, rel=1e-4)


class TestSliced:
    CONFIG = OTDDConfig("diagonal", "sliced")

    def test_itself_and_shift(self) -> None:
        features, labels = blobs(0)
        a, b = sketch_of(features, labels), sketch_of(features + 1, labels)
        assert distance(a, a, self.CONFIG) == pytest.approx(0, abs=1e-7)
        assert squared_distance(a, b, self.CONFIG) == pytest.approx(8, rel=1e-9)

    def test_is_a_lower_bound_that_ranks_alike(self) -> None:
        a = sketch_of(*blobs(0))
        others = []
        for seed in range(1, 9):
            features, labels = blobs(seed)
            others.append(sketch_of((1 + 0.5 * seed) * features, labels))
        sliced = [distance(a, b, self.CONFIG) for b in others]
        exact = [distance(a, b, OTDDConfig("diagonal")) for b in others]
        assert all(s <= e for s, e in zip(sliced, exact, strict=True))
        assert scipy.stats.spearmanr(sliced, exact).statistic > 0.9

    def test_weights_count(self) -> None:
        """Two points of weight 1/2 and 1/2 are four, two of them twice."""
        features, labels = blobs(0, classes=2, images=4)
        a, b = sketch_of(features, labels), sketch_of(*blobs(1, classes=2, images=4))
        twice = replace(a, points=a.points.repeat(2, 1), labels=a.labels.repeat(2))
        expected = distance(a, b, self.CONFIG)
        assert distance(twice, b, self.CONFIG) == pytest.approx(expected, rel=1e-9)

    def test_refuses_classes_that_are_no_vectors(self) -> None:
        with pytest.raises(ConfigurationError, match="'diagonal' or 'means', not 'gaussian'"):
            OTDDConfig("gaussian", "sliced")


def test_an_iteration_that_does_not_settle_is_an_error() -> None:
    a, b = sketch_of(*blobs(0)), sketch_of(*blobs(1))
    with pytest.raises(NASError, match="take a larger one, or the exact outer problem"):
        distance(a, b, OTDDConfig(outer="entropic", regularisation=0.001))


@pytest.mark.parametrize("share", [0.3, 0.1])
def test_both_ways_to_iterate_agree(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    a, b = sketch_of(*blobs(0)), sketch_of(*blobs(1))
    config = OTDDConfig(outer="entropic", regularisation=share, debiased=False)
    plain = squared_distance(a, b, config)
    monkeypatch.setattr("nas.transfer.otdd.transport.SAFE_EXPONENT", 0)
    assert squared_distance(a, b, config) == pytest.approx(plain, rel=1e-6)

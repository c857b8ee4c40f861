"""Statistics against published vectors, tables, closed forms and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from nas.errors import ConfigurationError
from nas.statistics import (
    Interval,
    kendall_tau_b,
    mean_interval,
    paired_difference,
    proportion_interval,
    relative_improvement,
    relative_improvement_interval,
    spearman,
    welch_difference,
)

# CIFAR-10 accuracies of 8 networks each, released with Yang et al., ICLR 2020
DARTS_RANDOM = [97.05, 96.85, 96.57, 97.09, 96.76, 97.10, 96.94, 97.02]
DARTS = [97.47, 97.15, 97.41, 97.05, 96.93, 97.13, 97.40, 97.34]
ENAS_RANDOM = [95.78, 95.64, 96.08, 95.12, 96.05, 95.99, 96.09, 96.00]
ENAS = [95.64, 96.10, 95.18, 95.84, 96.32, 95.95, 95.86, 95.94]

A = [1.0, 2.0, 2.0, 3.0, 5.0, 4.0]
B = [2.0, 1.0, 3.0, 3.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("method", "random", "published"),
    [(DARTS, DARTS_RANDOM, 0.3224), (ENAS, ENAS_RANDOM, 0.0104)],
)
def test_relative_improvement_repeats_the_published_values(
    method: list[float], random: list[float], published: float
) -> None:
    assert round(relative_improvement(method, random), 4) == published


@pytest.mark.parametrize(
    ("method", "random", "message"),
    [
        ([0.9, 0.8], [0.7], "equally many values, not 2 with 1"),
        ([], [], "at least 1 value,"),
        ([0.9], [0.0], "baseline above 0"),
        ([0.9], [math.nan], "finite"),
    ],
)
def test_relative_improvement_refuses_an_unfit_baseline(
    method: list[float], random: list[float], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        relative_improvement(method, random)
    with pytest.raises(ConfigurationError, match=message):
        relative_improvement_interval(method, random)


def test_relative_improvement_interval_is_the_delta_methods() -> None:
    """For many values Fieller's interval is the delta method's."""
    rng = np.random.default_rng(3)
    method, random = rng.normal(0.8, 0.05, 400), rng.normal(0.7, 0.08, 400)
    interval = relative_improvement_interval(method.tolist(), random.tolist())
    a, b = method.mean(), random.mean()
    error = 100 * math.sqrt(method.var() / 400 / b**2 + random.var() / 400 * (a / b**2) ** 2)
    assert interval.mean == pytest.approx(100 * (a - b) / b)
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.1 * error)


def test_relative_improvement_interval_covers_as_it_says() -> None:
    """Three networks a group: the interval holds the true value in 95% of the experiments."""
    rng = np.random.default_rng(0)
    truth = 100 * (0.82 / 0.80 - 1)
    hits = 0
    for _ in range(1000):
        ours, baseline = rng.normal(0.82, 0.02, 3), rng.normal(0.80, 0.01, 3)
        interval = relative_improvement_interval(ours.tolist(), baseline.tolist())
        hits += interval.low <= truth <= interval.high
    assert 930 <= hits <= 985  # Welch's degrees of freedom err on the safe side


def test_relative_improvement_interval_of_the_published_runs() -> None:
    interval = relative_improvement_interval(DARTS, DARTS_RANDOM)
    assert interval.n == 8
    assert interval.low < 0.3224 < interval.high
    # equal groups without spread, and a baseline that may be 0
    assert relative_improvement_interval([0.5, 0.5], [0.5, 0.5]).low == 0
    assert math.isnan(relative_improvement_interval([0.5, 0.6], [0.0, 0.1]).low)


def test_one_network_has_no_interval() -> None:
    for interval in (
        mean_interval([0.9]),
        relative_improvement_interval([0.9], [0.8]),
    ):
        assert interval.n == 1
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_mean_interval_uses_students_table() -> None:
    # t(0.975, 3 degrees of freedom) is 3.182 in every table, t(0.95, 3) is 2.353
    standard_error = math.sqrt(5 / 3) / 2
    interval = mean_interval([1, 2, 3, 4])
    assert (interval.mean, interval.n) == (2.5, 4)
    assert interval.high - 2.5 == pytest.approx(3.182 * standard_error, rel=2e-4)
    assert 2.5 - interval.low == pytest.approx(3.182 * standard_error, rel=2e-4)
    assert mean_interval([1, 2, 3, 4], 0.9).high - 2.5 == pytest.approx(
        2.353 * standard_error, rel=2e-4
    )


def test_mean_interval_is_not_clipped() -> None:
    assert mean_interval([0.99, 1.0, 0.9]).high > 1


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [0.5, math.inf]])
def test_mean_interval_refuses_missing_values(values: list[float]) -> None:
    with pytest.raises(ConfigurationError, match="needs"):
        mean_interval(values)


def test_mean_interval_refuses_a_percentage() -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        mean_interval([1, 2], confidence=95)


@pytest.mark.parametrize(("correct", "total"), [(8, 10), (0, 7), (7, 7), (5_432, 10_000)])
def test_proportion_interval_is_wilsons(correct: int, total: int) -> None:
    z, p = 1.959964, correct / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    interval = proportion_interval(correct, total)
    assert interval == Interval(p, interval.low, interval.high, total)
    assert interval.low == pytest.approx(centre - half, abs=1e-6)
    assert interval.high == pytest.approx(centre + half, abs=1e-6)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_proportion_interval_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ConfigurationError, match="correct <= total"):
        proportion_interval(correct, total)


def test_welch_difference_follows_its_formula() -> None:
    difference = welch_difference(DARTS, DARTS_RANDOM)
    a, b = np.var(DARTS, ddof=1) / 8, np.var(DARTS_RANDOM, ddof=1) / 8
    freedom = (a + b) ** 2 / (a**2 / 7 + b**2 / 7)
    assert freedom == pytest.approx(13.9, abs=0.1)  # t(0.975, 13.9) = 2.146 in tables
    assert difference.mean == pytest.approx(0.3125)
    assert difference.high - difference.mean == pytest.approx(2.146 * math.sqrt(a + b), rel=1e-3)
    assert difference.mean - difference.low == pytest.approx(2.146 * math.sqrt(a + b), rel=1e-3)


def test_welch_p_value_agrees_with_its_interval() -> None:
    """The interval holds 0 exactly when p is above 0.05, whichever way round."""
    assert welch_difference(DARTS, DARTS_RANDOM).p_value < 0.05
    assert welch_difference(DARTS, DARTS_RANDOM).low > 0
    same = welch_difference(ENAS, ENAS_RANDOM)
    assert same.p_value > 0.05
    assert same.low < 0 < same.high
    assert welch_difference(ENAS_RANDOM, ENAS).mean == -same.mean


def test_welch_difference_without_spread_is_honest() -> None:
    difference = welch_difference([0.5, 0.5], [0.4, 0.4])
    assert difference.mean == pytest.approx(0.1)
    assert math.isnan(difference.p_value)
    with pytest.raises(ConfigurationError, match="at least 2 values"):
        welch_difference([0.5], [0.4, 0.4])


def test_kendall_tau_b_counts_pairs() -> None:
    signs = [
        (np.sign(A[i] - A[j]), np.sign(B[i] - B[j])) for i, j in combinations(range(len(A)), 2)
    ]
    agreement = sum(x * y for x, y in signs)
    untied = math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
    assert kendall_tau_b(A, B) == pytest.approx(agreement / untied)
    assert kendall_tau_b(A, [-value for value in A]) == pytest.approx(-1)


def test_spearman_correlates_mean_ranks() -> None:
    ranks_a, ranks_b = [1, 2.5, 2.5, 4, 6, 5], [2, 1, 3.5, 3.5, 5.5, 5.5]
    assert spearman(A, B) == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])


@pytest.mark.parametrize("correlation", [kendall_tau_b, spearman])
def test_rank_correlation_limits(correlation: Callable[..., float]) -> None:
    assert correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ConfigurationError, match="not 3 with 2"):
        correlation([1, 2, 3], [1, 2])
    with pytest.raises(ConfigurationError, match="at least 2"):
        correlation([1], [1])


class TestPairedDifference:
    def test_by_hand(self) -> None:
        # differences 1 to 5: mean 3, deviation sqrt(2.5), t(4) = 2.776; two of 32 signs as extreme
        found = paired_difference([2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
        half = 2.7764451 * math.sqrt(2.5 / 5)
        assert found.mean == 3
        assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
        assert found.p_value == pytest.approx(2 / 32)

    def test_pairs_that_do_not_differ(self) -> None:
        found = paired_difference([1, 2], [1, 2])
        assert (found.mean, found.low, found.high) == (0, 0, 0)
        assert math.isnan(found.p_value)

    def test_as_many_on_either_side(self) -> None:
        with pytest.raises(ConfigurationError, match="equally many"):
            paired_difference([1, 2], [1])

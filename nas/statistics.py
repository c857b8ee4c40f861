"""Intervals, relative improvement and rank correlation: how sure a comparison of networks is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nas.errors import ConfigurationError

_CONFIDENCE = 0.95  # of every interval whose function has no say in it


@dataclass(frozen=True)
class Interval:
    """An estimate, the bounds of its confidence interval, and the number of values behind it.

    All three are in the unit of the values. ``low`` and ``high`` are nan where the values cannot
    bound the estimate, e.g. where there is only one.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """The difference of two means, the bounds of its interval, and its two-sided p value."""

    mean: float
    low: float
    high: float
    p_value: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean, e.g. of test accuracies over seeds.

    The bounds are not clipped: those of accuracies near 1 may pass 1, which says that the values
    are too few or too spread for this interval. A single value has an interval of (nan, nan).

    Raises:
        ConfigurationError: no values, a value that is not finite, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ConfigurationError(f"a confidence lies between 0 and 1, e.g. 0.95, not {confidence}")
    sample = _sample(values, "an interval", least=1)
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    quantile = stats.t.ppf((1 + confidence) / 2, df=n - 1)
    half = float(quantile * sample.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def proportion_interval(correct: int, total: int) -> Interval:
    """Wilson's 95% score interval of an accuracy measured on ``total`` images; within [0, 1].

    It holds the sampling error of the test images only, not the spread over seeds.

    Raises:
        ConfigurationError: not ``0 <= correct <= total`` with ``total >= 1``.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ConfigurationError(
            f"a proportion needs 0 <= correct <= total and total >= 1, not {correct} of {total}"
        )
    bounds = stats.binomtest(correct, total).proportion_ci(_CONFIDENCE, method="wilson")
    return Interval(correct / total, float(bounds.low), float(bounds.high), total)


def relative_improvement(method: Sequence[float], random: Sequence[float]) -> float:
    """RI = 100 (mean(method) - mean(random)) / mean(random), in percent.

    ``method`` and ``random`` are accuracies of equally many networks of the same space, trained
    by the same recipe (Yang et al., NAS evaluation is frustratingly hard, ICLR 2020).

    Raises:
        ConfigurationError: no values, a baseline of another size, an accuracy below 0 or a
            baseline of 0.
    """
    ours, baseline = _accuracies(method, random)
    return float(_improvement(ours, baseline))


def relative_improvement_interval(method: Sequence[float], random: Sequence[float]) -> Interval:
    """95% interval of the relative improvement, in percent: Fieller's, for a ratio of two means.

    The groups may spread differently (degrees of freedom by Welch and Satterthwaite). ``n`` is
    the number of networks in each group; with one a group, or a baseline that may well be 0, the
    bounds are nan.

    Raises:
        ConfigurationError: as :func:`relative_improvement`.
    """
    ours, baseline = _accuracies(method, random)
    n, base = len(ours), baseline.mean()
    estimate = float(_improvement(ours, baseline))
    ratio = ours.mean() / base
    unbounded = Interval(estimate, math.nan, math.nan, n)
    if n == 1:
        return unbounded
    ours_error, base_error = ours.var(ddof=1) / n, baseline.var(ddof=1) / n
    of_ratio = ratio**2 * base_error
    if ours_error + of_ratio == 0:
        return Interval(estimate, estimate, estimate, n)
    freedom = (n - 1) * (ours_error + of_ratio) ** 2 / (ours_error**2 + of_ratio**2)
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, df=freedom)
    g = quantile**2 * base_error / base**2
    if g >= 1:
        return unbounded
    half = quantile / base * math.sqrt((1 - g) * ours_error + of_ratio)
    low, high = (100 * ((ratio + sign * half) / (1 - g) - 1) for sign in (-1, 1))
    return Interval(estimate, float(low), float(high), n)


def welch_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """mean(a) - mean(b) with its 95% interval, by Welch's t test.

    The two groups may spread differently. Two groups without any spread have no t statistic:
    their bounds and p value are nan.

    Raises:
        ConfigurationError: a group of fewer than 2 values.
    """
    first = _sample(a, "Welch's test", least=2)
    second = _sample(b, "Welch's test", least=2)
    mean = float(first.mean() - second.mean())
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return Difference(mean, math.nan, math.nan, math.nan)
    test = stats.ttest_ind(first, second, equal_var=False)
    bounds = test.confidence_interval(_CONFIDENCE)
    return Difference(mean, float(bounds.low), float(bounds.high), float(test.pvalue))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """mean(a - b) of pairs with Student's 95% interval, and the p value of Wilcoxon's test.

    The signed-rank test asks nothing of the differences but that they are symmetric; pairs that do
    not differ are left out of it. Its p value is nan where none differs, the bounds where there is
    a single pair.

    Raises:
        ConfigurationError: no pairs, or sides of different length.
    """
    first, second = _pair(a, b, "a paired test", least=1)
    differences = first - second
    interval = mean_interval(differences.tolist(), _CONFIDENCE)
    p_value = math.nan
    if np.any(differences):
        p_value = float(stats.wilcoxon(differences).pvalue)
    return Difference(interval.mean, interval.low, interval.high, p_value)


def kendall_tau_b(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's rank correlation with ties accounted for; nan where a side is constant.

    Raises:
        ConfigurationError: fewer than 2 pairs, or sides of different length.
    """
    first, second = _pair(a, b, "a rank correlation", least=2)
    return float(stats.kendalltau(first, second, variant="b").statistic)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank; nan where a side is constant.

    Raises:
        ConfigurationError: fewer than 2 pairs, or sides of different length.
    """
    first, second = _pair(a, b, "a rank correlation", least=2)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan  # what SciPy answers too, but with a warning
    return float(stats.spearmanr(first, second).statistic)


def _improvement(ours: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Relative improvement over the last axis."""
    base = baseline.mean(axis=-1)
    return 100 * (ours.mean(axis=-1) - base) / base


def _accuracies(method: Sequence[float], random: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    ours, baseline = _pair(method, random, "a relative improvement", least=1)
    if ours.min() < 0 or baseline.min() < 0 or baseline.mean() == 0:
        raise ConfigurationError(
            "a relative improvement needs accuracies of at least 0 and a baseline above 0, not "
            f"{ours.tolist()} over {baseline.tolist()}"
        )
    return ours, baseline


def _sample(values: Sequence[float], what: str, least: int) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < least:
        raise ConfigurationError(
            f"{what} needs a list of at least {least} value{'s' * (least > 1)}, "
            f"not one of shape {list(sample.shape)}"
        )
    if not np.isfinite(sample).all():
        raise ConfigurationError(f"{what} needs finite values, not {sample.tolist()}")
    return sample


def _pair(
    a: Sequence[float], b: Sequence[float], what: str, least: int
) -> tuple[np.ndarray, np.ndarray]:
    first, second = _sample(a, what, least), _sample(b, what, least)
    if len(first) != len(second):
        raise ConfigurationError(
            f"{what} compares equally many values, not {len(first)} with {len(second)}"
        )
    return first, second

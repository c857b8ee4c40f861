"""The outer problem: what it costs to carry one weighted set of points to another."""

from __future__ import annotations

import math

import ot
import torch
from torch import Tensor

from nas.errors import NASError
from nas.randomness import generator

PIVOTS = 10_000_000  # far more than the network simplex needs for any size that fits in memory
ROUNDS = 5000  # of Sinkhorn's updates at the last regularisation
TOLERANCE = 1e-6  # distance of the plan's margins from the weights, as Sinkhorn measures it
SAFE_EXPONENT = 500  # float64 holds exp(-700)
COOLING = 0.25  # from one regularisation to the next smaller one


def exact_cost(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """Least mean cost of carrying weights ``a`` [n] to ``b`` [m], given ``cost`` float64 [n, m].

    Raises:
        NASError: the solver found no optimum.
    """
    # both must sum to the very same number
    margins = (a.numpy(), (b * (a.sum() / b.sum())).numpy())
    value, log = ot.emd2(*margins, cost.numpy(), numItermax=PIVOTS, log=True)
    if log["warning"] is not None:
        raise NASError(f"the transport between the sets was not solved: {log['warning']}")
    return max(0.0, float(value))


def entropic_cost(a: Tensor, b: Tensor, cost: Tensor, epsilon: float) -> float:
    """min <P, cost> + epsilon KL(P | a b^T), in the units of ``cost`` [n, m].

    Raises:
        NASError: Sinkhorn's iteration does not settle.
    """
    in_range = float(cost.max()) < SAFE_EXPONENT * epsilon
    log_u, log_v, error = (_plain if in_range else _logarithmic)(a, b, cost, epsilon)
    if error > TOLERANCE:
        raise NASError(
            f"Sinkhorn's iteration does not settle at a regularisation of {epsilon:.3g}: take a "
            "larger one, or the exact outer problem"
        )
    # the value of the dual problem, which forgives an inexact plan to second order
    value = (a * (log_u - a.log())).sum() + (b * (log_v - b.log())).sum()
    return epsilon * float(value)


def _plain(a: Tensor, b: Tensor, cost: Tensor, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Logarithms of the scalings u, v and the error: two products with a matrix a round."""
    _, log = ot.bregman.sinkhorn_knopp(
        a, b, cost, epsilon, numItermax=ROUNDS, stopThr=TOLERANCE, log=True, warn=False
    )
    return log["u"].log(), log["v"].log(), float(log["err"][-1])


def _logarithmic(
    a: Tensor, b: Tensor, cost: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, float]:
    """The same where exponentials would underflow: many times the work a round.

    From a strong regularisation to ``epsilon``, since a start that is warm needs far fewer rounds.
    """
    start = None
    current = float(cost.max())
    while True:
        last = current == epsilon
        _, log = ot.bregman.sinkhorn_log(
            a,
            b,
            cost,
            current,
            numItermax=ROUNDS if last else 20,
            stopThr=TOLERANCE,
            log=True,
            warn=False,
            warmstart=start,
        )
        if last:
            return log["log_u"], log["log_v"], float(log["err"][-1])
        cooler = max(epsilon, current * COOLING)
        start = (log["log_u"] * (current / cooler), log["log_v"] * (current / cooler))
        current = cooler


def sliced_cost(
    a: Tensor, b: Tensor, x: Tensor, y: Tensor, *, projections: int, seed: int
) -> float:
    """D times the mean squared W2 of ``x`` [n, D] and ``y`` [m, D] along random directions.

    Directions are whole orthonormal bases, at least ``projections`` directions in all: so the
    mean of squared projections, times D, is the squared length exactly, and the value a lower
    bound of the squared W2 that equals it for sets that are shifted copies.
    """
    dimensions = x.shape[1]
    bases = math.ceil(projections / dimensions)
    draw = generator(seed, "otdd", "projections")
    total = 0.0
    for _ in range(bases):
        gaussian = torch.randn(dimensions, dimensions, generator=draw, dtype=torch.float64)
        basis = torch.linalg.qr(gaussian).Q  # uniform up to signs, which W2 does not see
        along = ot.sliced_wasserstein_distance(
            x.numpy(), y.numpy(), a.numpy(), b.numpy(), p=2, projections=basis.numpy()
        )
        total += dimensions * float(along) ** 2
    return total / bases

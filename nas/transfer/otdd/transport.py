"""The outer problem: the cheapest way to carry one weighted set of points to another."""

from __future__ import annotations

import ot
from torch import Tensor

from nas.errors import NASError

PIVOTS = 10_000_000  # far more than the network simplex needs for any size that fits in memory


def exact_cost(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """Least mean cost of carrying weights ``a`` [n] to ``b`` [m], given ``cost`` float64 [n, m].

    Raises:
        NASError: the solver found no optimum.
    """
    # both must sum to the very same number
    value, log = ot.emd2(a.numpy(), (b * (a.sum() / b.sum())).numpy(), cost.numpy(),
                         numItermax=PIVOTS, log=True)  # fmt: skip
    if log["warning"] is not None:
        raise NASError(f"the transport between the sets was not solved: {log['warning']}")
    return max(0.0, float(value))

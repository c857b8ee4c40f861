"""Signs that a differentiable search is collapsing into skip connections."""

from __future__ import annotations

from nas.spaces.darts.genotype import Genotype, skip_count
from nas.spaces.darts.supernet import NORMAL, REDUCE, Mixing


def collapse_metrics(mixing: Mixing, genotype: Genotype) -> dict[str, float]:
    """Entropy of the mixing weights (nats, mean over the edges) and skips, for either cell.

    Uniform weights over eight operations have an entropy of ln 8 = 2.08; a decided edge has 0.
    """
    weights = mixing.operations.detach().clamp_min(1e-12)
    entropy = -(weights * weights.log()).sum(-1).mean(-1)
    return {
        "alpha/entropy_normal": float(entropy[NORMAL]),
        "alpha/entropy_reduce": float(entropy[REDUCE]),
        "skip/normal": float(skip_count(genotype.normal)),
        "skip/reduce": float(skip_count(genotype.reduce)),
    }

"""Correctness comes before time: every implementation must compute what the eager one does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.supernet.setting import DisagreementError
from nas.ops.backend import FLOAT32

# Relative to the norm, in float32. A ReLU or a pool that the last bit decides the other way moves
# gradients far more than scores; where weights are mixed up both are off by their whole size.
TOLERANCES = {"scores": 1e-4, "weights": 1e-2, "architecture": 1e-2}
# Where images are stored in bfloat16, whose 8 bits move gradients by a tenth or two of their norm.
HALF_TOLERANCES = {"scores": 5e-2, "weights": 3e-1, "architecture": 3e-1}


@dataclass(frozen=True)
class Evidence:
    """What one implementation computes from the weights that all begin with.

    Attributes:
        scores: of the training batch, [B, classes].
        weights: gradient of its loss by the supernet's flat weights.
        architecture: first-order gradient of the validation loss by alphas (and betas), flat.
    """

    scores: Tensor
    weights: Tensor
    architecture: Tensor


def check_agreement(name: str, found: Evidence, expected: Evidence, dtype: str = FLOAT32) -> None:
    """Hold what the implementation ``name`` computes against the eager one.

    Raises:
        DisagreementError: the scores or a gradient are off by more than the last bits can do.
    """
    for part, tolerance in (TOLERANCES if dtype == FLOAT32 else HALF_TOLERANCES).items():
        error = relative_error(getattr(found, part), getattr(expected, part))
        if not error <= tolerance:  # NaN is no agreement
            what = part if part == "scores" else f"gradient of the {part}"
            raise DisagreementError(
                f"'{name}' disagrees with 'eager' before any timing: the {what} is off by "
                f"{error:.1e} of its norm, more than {tolerance:.0e}"
            )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    wanted = expected.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()

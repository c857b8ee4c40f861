"""DARTS, second order: the architecture gradient through one step of the weights.

Liu et al., arXiv 1806.09055, section 2.3. First order is the shared :class:`Method` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nas.search.method import Method

if TYPE_CHECKING:
    from nas.data import Batch
    from nas.search.bilevel import BilevelSearch

PERTURBATION = 0.01  # epsilon = 0.01 / |v|, the paper's footnote 2


class SecondOrderDarts(Method):
    """DARTS with the unrolled step and a finite-difference Hessian-vector product."""

    name = "darts-2nd"
    summary = "DARTS, second order: unrolled step with momentum (arXiv 1806.09055)"
    capturable = False

    def architecture_gradients(
        self, search: BilevelSearch, train: Batch, validation: Batch
    ) -> list[Tensor]:
        """Equations 6 to 8: the validation gradient at w', less eta times the mixed Hessian."""
        supernet, weights = search.supernet, search.supernet.weights
        parameters = supernet.architecture_parameters()
        rate = search.learning_rate

        unrolled = self._unrolled_weights(search, train)
        loss = search.loss(validation, self.mixing(supernet), unrolled, update_statistics=False)
        penalty = self.penalty(search)
        total = loss if penalty is None else loss + penalty
        *outer, direction = torch.autograd.grad(total, [*parameters, unrolled])

        with torch.no_grad():
            epsilon = PERTURBATION / direction.norm().clamp_min(1e-12)  # it may be exactly 0
            shift = epsilon * direction
        plus = self._train_gradients(search, train, weights.detach() + shift)
        minus = self._train_gradients(search, train, weights.detach() - shift)
        return [
            gradient - rate * (above - below) / (2 * epsilon)
            for gradient, above, below in zip(outer, plus, minus, strict=True)
        ]

    def _unrolled_weights(self, search: BilevelSearch, train: Batch) -> Tensor:
        """w' = w - eta (momentum * buffer + gradient + decay * w), a leaf of its own graph."""
        weights = search.supernet.weights
        loss = search.loss(train, self.mixing(search.supernet).detach(), weights)
        (gradient,) = torch.autograd.grad(loss, [weights])
        config = search.config
        with torch.no_grad():
            step = gradient + config.weight_decay * weights
            buffer = search.weight_optimiser.state[weights].get("momentum_buffer")
            if buffer is not None:
                step += config.momentum * buffer
            unrolled = weights - search.learning_rate * step
        return unrolled.requires_grad_()

    def _train_gradients(
        self, search: BilevelSearch, train: Batch, weights: Tensor
    ) -> tuple[Tensor, ...]:
        mixing = self.mixing(search.supernet)
        loss = search.loss(train, mixing, weights, update_statistics=False)
        return torch.autograd.grad(loss, search.supernet.architecture_parameters())

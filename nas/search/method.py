"""What a differentiable search method may decide; everything else is the shared bilevel loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nas.errors import ConfigurationError
from nas.search.stopping import Stopping
from nas.spaces.darts.supernet import Mixing, Supernet, SupernetConfig

if TYPE_CHECKING:
    from nas.data import Batch
    from nas.search.bilevel import BilevelSearch


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a bilevel search; the defaults are first-order DARTS on CIFAR-10 (its 3.1).

    Attributes:
        supernet: its size.
        epochs, batch_size: length of the search; images a step, from either half of the data.
        learning_rate, learning_rate_end: SGD on the weights, half a cosine between the two.
        momentum, weight_decay, gradient_clip: of the weights.
        architecture_learning_rate, architecture_weight_decay: Adam (0.5, 0.999) on the alphas.
        warmup_epochs: epochs at the start in which only the weights learn (PC-DARTS).
        crop_padding, flip: augmentation, with ``flip`` only where the data allow it.
        skip_limit: skips in the normal cell above this many are called a collapse (P-DARTS: 2).
        stopping: what may end the search before its last epoch; by default nothing.
    """

    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 0.025
    learning_rate_end: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    gradient_clip: float = 5.0
    architecture_learning_rate: float = 3e-4
    architecture_weight_decay: float = 1e-3
    warmup_epochs: int = 0
    crop_padding: int = 4
    flip: bool = True
    skip_limit: int = 2
    stopping: Stopping = field(default_factory=Stopping)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:  # a batch is normalised by its own statistics
            raise ConfigurationError(
                "a search needs at least 1 epoch and a batch size of at least 2, not "
                f"{self.epochs} and {self.batch_size}"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigurationError(
                f"the alphas are frozen for {self.warmup_epochs} of {self.epochs} epochs: leave "
                "them at least one to learn in"
            )


class Method:
    """A differentiable search method: first-order DARTS, unless a subclass overrides a hook."""

    name = "darts"
    summary = "DARTS, first order (arXiv 1806.09055)"
    capturable = True  # its steps are the same kernels every time, and draw nothing on the CPU

    def paper_config(self) -> SearchConfig:
        """The settings of the method's paper on CIFAR-10."""
        return SearchConfig()

    def mixing(self, supernet: Supernet) -> Mixing:
        """How the architecture parameters become mixing weights."""
        edges = None
        if supernet.betas is not None:
            nodes = supernet.betas.split(supernet.incoming, dim=-1)
            edges = torch.cat([betas.softmax(-1) for betas in nodes], -1)
        return Mixing(supernet.alphas.softmax(-1), edges)

    def weight_mixing(self, search: BilevelSearch) -> Mixing:
        """Mixing weights for the weight step; SDARTS perturbs them here."""
        return self.mixing(search.supernet)

    def penalty(self, search: BilevelSearch) -> Tensor | None:
        """What is added to the validation loss of the architecture step."""
        return None

    def architecture_gradients(
        self, search: BilevelSearch, train: Batch, validation: Batch
    ) -> list[Tensor]:
        """Gradients for ``supernet.architecture_parameters()``.

        First order (DARTS, equation 6 with xi = 0): of the validation loss at today's weights.
        """
        supernet = search.supernet
        loss = search.loss(validation, self.mixing(supernet), supernet.weights.detach())
        penalty = self.penalty(search)
        total = loss if penalty is None else loss + penalty
        return list(torch.autograd.grad(total, supernet.architecture_parameters()))

    def between_epochs(self, search: BilevelSearch, epoch: int) -> None:
        """Called after each epoch: schedules, pruning."""

"""P-DARTS: stages of deeper supernets and fewer operations (Chen et al., arXiv 1904.12760).

The stages themselves are settings of the loop (:mod:`nas.search.stages`), since any other method
may be combined with them; the dropout of skips and the limit on skips are the method's own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nas.ops.mixed import REDUCING, SKIP
from nas.randomness import generator
from nas.search.method import Method, SearchConfig
from nas.search.stages import Stage
from nas.spaces.darts.genotype import Genotype, skip_count
from nas.spaces.darts.supernet import NORMAL, REDUCE, Mixing, SupernetConfig

if TYPE_CHECKING:
    from nas.search.bilevel import BilevelSearch

DROPOUT_DECAY = 0.2  # an epoch, once the alphas learn


class ProgressiveDarts(Method):
    """First-order DARTS in three stages, with dropout on skips and at most two of them."""

    name = "pdarts"
    summary = "P-DARTS: stages of deeper supernets and fewer operations (arXiv 1904.12760)"
    capturable = False  # which skips are dropped is drawn on the CPU in each step

    def paper_config(self) -> SearchConfig:
        """Section 4.1 and the authors' code: 5, 11, 17 cells; 8, 5, 3 operations; 25 epochs each.

        Rates of the dropout are those for CIFAR-10.
        """
        return SearchConfig(
            supernet=SupernetConfig(channels=16, cells=5),
            epochs=25,
            batch_size=96,
            learning_rate=0.025,
            learning_rate_end=0.0,
            architecture_learning_rate=6e-4,
            warmup_epochs=10,
            stages=(Stage(), Stage(5, 6, 0.4), Stage(3, 12, 0.7)),
        )

    def weight_mixing(self, search: BilevelSearch) -> Mixing:
        """The mixing weights, with skips dropped."""
        return self._without_some_skips(search, "weights")

    def architecture_mixing(self, search: BilevelSearch) -> Mixing:
        """The same, of another draw."""
        return self._without_some_skips(search, "architecture")

    def derive(self, search: BilevelSearch, mixing: Mixing) -> Genotype:
        """The cells, with at most ``config.skip_limit`` skips in the normal one.

        While there are more, the chosen skip that weighs least is ruled out and the cells are
        derived again, so that every node keeps two inputs.
        """
        weights = mixing.operations.detach().clone()
        while True:
            genotype = search.supernet.derive(replace(mixing, operations=weights))
            if skip_count(genotype.normal) <= search.config.skip_limit:
                return genotype
            discrete = mixing.discretised(genotype).operations[NORMAL, :, SKIP] > 0
            skips = weights[NORMAL, :, SKIP].masked_fill(~discrete, math.inf)
            weights[NORMAL, skips.argmin(), SKIP] = 0

    def skip_dropout(self, search: BilevelSearch) -> float:
        """p of this epoch: falls in a line while the alphas wait, then from the start by decay."""
        start, epoch, config = search.stage.skip_dropout, search.stage_epoch, search.config
        if epoch < config.warmup_epochs:
            return start * (config.epochs - epoch - 1) / config.epochs
        return start * math.exp(-DROPOUT_DECAY * (epoch - config.warmup_epochs))

    def _without_some_skips(self, search: BilevelSearch, level: str) -> Mixing:
        """Each edge's skip is dropped with the chance p, and otherwise weighs 1 / (1 - p) as much.

        Not those of stride 2, which are convolutions.
        """
        mixing, chance = self.mixing(search.supernet), self.skip_dropout(search)
        if chance == 0:
            return mixing
        draw = generator(search.seed, "search/skips", level, search.epoch, search.batch)
        factors = torch.ones(mixing.operations.shape)
        kept = torch.rand(factors.shape[:-1], generator=draw) >= chance
        factors[..., SKIP] = kept / (1 - chance)
        factors[REDUCE, REDUCING, SKIP] = 1
        return replace(mixing, operations=mixing.operations * factors.to(mixing.operations))

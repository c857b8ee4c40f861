"""PC-DARTS: partial channels and edge normalisation (Xu et al., arXiv 1907.05737).

Both live in the supernet (``SupernetConfig.partial`` and ``edge_normalisation``), since any other
method may be combined with them; what is left of the method is its settings.
"""

from __future__ import annotations

from nas.search.method import Method, SearchConfig
from nas.spaces.darts.supernet import SupernetConfig


class PartialChannelDarts(Method):
    """First-order DARTS on a quarter of the channels, the alphas frozen for 15 epochs."""

    name = "pcdarts"
    summary = "PC-DARTS: partial channels and edge normalisation (arXiv 1907.05737)"

    def paper_config(self) -> SearchConfig:
        """Section 4.2: K = 4, batch 256, learning rate 0.1 to 0, 15 warm-up epochs of 50."""
        return SearchConfig(
            supernet=SupernetConfig(partial=4, edge_normalisation=True),
            batch_size=256,
            learning_rate=0.1,
            learning_rate_end=0.0,
            architecture_learning_rate=6e-4,
            warmup_epochs=15,
        )

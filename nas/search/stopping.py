"""When a search ends before its last epoch: its accuracy, its cells or its skips say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nas.errors import ConfigurationError
from nas.observer import EpochRecord

ACCURACY = "supernet/val_accuracy"
AGE = "genotype/age"  # epochs for which the derived cells have not changed
SKIPS = "skip/normal"


@dataclass(frozen=True)
class Stop:
    """Why a search ended early.

    Attributes:
        rule: "plateau", "genotype" or "skips".
        epoch: the last one that ran, from 0.
        reason: for people.
    """

    rule: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class Stopping:
    """The rules that may end a search early, after any epoch in which the alphas learnt.

    A rule that is None is off, and the first that holds ends the search; its cells are those of
    that epoch.

    Attributes:
        plateau_epochs: the validation accuracy of the supernet has risen by less than
            ``plateau_delta`` (0..1) above its best for so many epochs.
        genotype_epochs: the derived cells have not changed for so many epochs.
        skip_limit: the derived normal cell has more skip connections than this.
    """

    plateau_epochs: int | None = None
    plateau_delta: float = 0.001
    genotype_epochs: int | None = None
    skip_limit: int | None = None

    def __post_init__(self) -> None:
        for name, epochs in (("plateau", self.plateau_epochs), ("genotype", self.genotype_epochs)):
            if epochs is not None and epochs < 1:
                raise ConfigurationError(
                    f"the rule '{name}' waits for at least 1 epoch, not {epochs}"
                )
        if not 0 <= self.plateau_delta < 1:
            raise ConfigurationError(
                f"a rise in accuracy lies within 0 and 1, {self.plateau_delta} does not"
            )
        if self.skip_limit is not None and self.skip_limit < 0:
            raise ConfigurationError(f"a cell has at least 0 skips, not {self.skip_limit}")

    def judge(self, records: Sequence[EpochRecord]) -> Stop | None:
        """What ends the search after the last of ``records``, the epochs in which alphas learnt."""
        if not records:
            return None
        rules: dict[str, Callable[[Sequence[EpochRecord]], str | None]] = {
            "plateau": self._plateau,
            "genotype": self._stable_genotype,
            "skips": self._skips,
        }
        for name, rule in rules.items():
            if (reason := rule(records)) is not None:
                return Stop(name, records[-1].epoch, reason)
        return None

    def _plateau(self, records: Sequence[EpochRecord]) -> str | None:
        if self.plateau_epochs is None:
            return None
        best, waited = -1.0, 0
        for record in records:
            accuracy = record.metrics[ACCURACY]
            if accuracy >= best + self.plateau_delta and accuracy > best:
                best, waited = accuracy, 0
            else:
                waited += 1
        if waited < self.plateau_epochs:
            return None
        return (
            f"for {waited} epochs the supernet's validation accuracy has not risen by "
            f"{self.plateau_delta:.1%} above {best:.2%}"
        )

    def _stable_genotype(self, records: Sequence[EpochRecord]) -> str | None:
        age = records[-1].metrics[AGE]
        if self.genotype_epochs is None or age < self.genotype_epochs:
            return None
        return f"for {age:.0f} epochs the derived cells have not changed"

    def _skips(self, records: Sequence[EpochRecord]) -> str | None:
        skips = records[-1].metrics[SKIPS]
        if self.skip_limit is None or skips <= self.skip_limit:
            return None
        return f"the normal cell has {skips:.0f} skip connections, more than {self.skip_limit}"


RULES: dict[str, Stopping] = {
    "plateau": Stopping(plateau_epochs=5),
    "genotype": Stopping(genotype_epochs=5),
    "skips": Stopping(skip_limit=2),
}
"""Each rule alone, as a search has it that asks for it by name."""

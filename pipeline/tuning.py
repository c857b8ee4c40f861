"""The only file that talks to Optuna: samplers propose architectures, the caller scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from nas.architecture import Architecture, Skeleton
from nas.errors import NASError, NonFiniteLossError, UnknownNameError
from nas.randomness import derive_seed
from nas.spaces import Space

# A sampler is made anew for each trial, from a seed of that trial: what it proposes depends on
# the trials before and on nothing else, so a search that was killed proposes the same again.
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
}
SPARE_TRIALS = 2  # a search tries this many times the wanted number before it gives up


@dataclass(frozen=True)
class Outcome:
    """What became of one proposed architecture: a score, or the reason why there is none."""

    number: int
    architecture: Architecture
    score: float | None
    reason: str | None


def sampled_search(
    sampler: str,
    space: Space,
    skeleton: Skeleton,
    score: Callable[[int, Architecture], float],
    *,
    wanted: int,
    seed: int,
) -> list[Outcome]:
    """Ask ``sampler`` for architectures of ``space`` until ``wanted`` of them have a score.

    An architecture that runs out of memory or leaves the finite numbers is an outcome with a
    reason, and the search goes on.

    Args:
        score: takes the trial's number and its architecture; larger is better.

    Raises:
        UnknownNameError: no sampler has that name.
        NASError: twice the wanted number was tried and too few had a score.
    """
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(choices) for name, choices in space.decisions().items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    outcomes: list[Outcome] = []
    for trial, decisions in _proposals(study, sampler, distributions, seed):
        architecture = space.architecture(decisions, skeleton)
        try:
            value = score(trial.number, architecture)
        except (NonFiniteLossError, torch.OutOfMemoryError, MemoryError) as error:
            study.tell(trial, state=TrialState.FAIL)
            outcomes.append(Outcome(trial.number, architecture, None, _reason(error)))
        else:
            study.tell(trial, value)
            outcomes.append(Outcome(trial.number, architecture, value, None))
        if sum(outcome.score is not None for outcome in outcomes) == wanted:
            return outcomes
        if len(outcomes) == SPARE_TRIALS * wanted:
            break
    raise NASError(
        f"only {sum(o.score is not None for o in outcomes)} of {len(outcomes)} sampled networks "
        f"could be trained and {wanted} are wanted; the last reason was: {outcomes[-1].reason}"
    )


def _proposals(
    study: optuna.Study,
    sampler: str,
    distributions: Mapping[str, BaseDistribution],
    seed: int,
) -> Iterator[tuple[optuna.Trial, dict[str, str]]]:
    while True:
        # Optuna seeds NumPy's generator, which takes 32 bits.
        study.sampler = SAMPLERS[sampler](derive_seed(seed, sampler, len(study.trials)) % 2**32)
        trial = study.ask(dict(distributions))
        yield trial, {name: str(choice) for name, choice in trial.params.items()}


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, NonFiniteLossError) else f"out of memory: {text}"

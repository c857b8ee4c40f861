"""The only file that talks to Optuna: samplers propose architectures, the caller scores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# What may befall one network of many without ending the search.
FAILURES = (NonFiniteLossError, torch.OutOfMemoryError, MemoryError)
NO_CPU_MEMORY = "can't allocate memory"  # PyTorch has no type of its own for this one


@dataclass(frozen=True)
class Proposal:
    """An architecture that a sampler wants scored."""

    number: int
    architecture: Architecture


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal: a score, or the reason why there is none."""

    number: int
    architecture: Architecture
    score: float | None
    reason: str | None


def sampled_search(
    sampler: str,
    space: Space,
    skeleton: Skeleton,
    evaluate: Callable[[Sequence[Proposal]], Sequence[float | Exception]],
    *,
    wanted: int,
    seed: int,
    together: int = 1,
) -> list[Outcome]:
    """Ask ``sampler`` for architectures of ``space`` until ``wanted`` of them have a score.

    An architecture that runs out of memory or leaves the finite numbers is an outcome with a
    reason, and the search goes on.

    Args:
        evaluate: the score of each proposal, larger is better, or the error that it failed by.
        together: proposals asked for before their scores are told. A sampler that learns from
            scores proposes otherwise for another number; a random one does not.

    Raises:
        UnknownNameError: no sampler has that name.
        NASError: twice the wanted number was tried and too few had a score.
    """
    if sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    outcomes: list[Outcome] = []
    limit = SPARE_TRIALS * wanted
    while (scored := sum(outcome.score is not None for outcome in outcomes)) < wanted:
        if len(outcomes) >= limit:
            raise NASError(
                f"only {scored} of {len(outcomes)} sampled networks could be trained and {wanted} "
                f"are wanted; the last reason was: {outcomes[-1].reason}"
            )
        number = min(together, wanted - scored, limit - len(outcomes))
        trials = [_ask(study, sampler, space, seed) for _ in range(number)]
        proposals = [
            Proposal(trial.number, space.architecture(trial.params, skeleton)) for trial in trials
        ]
        for trial, proposal, score in zip(trials, proposals, evaluate(proposals), strict=True):
            outcomes.append(_tell(study, trial, proposal, score))
    return outcomes


def is_failure(error: Exception) -> bool:
    """Whether ``error`` is the end of one network only: out of memory, or not finite."""
    return isinstance(error, FAILURES) or NO_CPU_MEMORY in str(error)


def _ask(study: optuna.Study, sampler: str, space: Space, seed: int) -> optuna.Trial:
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(choices) for name, choices in space.decisions().items()
    }
    # Optuna seeds NumPy's generator, which takes 32 bits.
    number = len(study.get_trials(deepcopy=False))  # a copy of every trial would cost seconds
    study.sampler = SAMPLERS[sampler](derive_seed(seed, sampler, number) % 2**32)
    return study.ask(distributions)


def _tell(
    study: optuna.Study, trial: optuna.Trial, proposal: Proposal, score: float | Exception
) -> Outcome:
    if isinstance(score, Exception):
        study.tell(trial, state=TrialState.FAIL)
        return Outcome(proposal.number, proposal.architecture, None, _reason(score))
    study.tell(trial, score)
    return Outcome(proposal.number, proposal.architecture, score, None)


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, NonFiniteLossError) else f"out of memory: {text}"

"""Sampled searches: what is proposed, how often, and what becomes of a network that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from nas.architecture import Architecture, Skeleton
from nas.errors import DataError, NASError, NonFiniteLossError, UnknownNameError
from nas.spaces import DartsSpace
from pipeline.tuning import FAILURES, Outcome, Proposal, sampled_search

SKELETON = Skeleton("cifar", 4, 3)


def search(
    evaluate: Callable[[Proposal], float | Exception] = lambda _: 0.5,
    *,
    wanted: int = 4,
    seed: int = 0,
    together: int = 1,
    sampler: str = "random",
) -> list[Outcome]:
    def evaluate_all(proposals: Sequence[Proposal]) -> list[float | Exception]:
        return [evaluate(proposal) for proposal in proposals]

    return sampled_search(
        sampler,
        DartsSpace(),
        SKELETON,
        evaluate_all,
        wanted=wanted,
        seed=seed,
        together=together,
    )


def architectures(outcomes: Sequence[Outcome]) -> list[Architecture]:
    return [outcome.architecture for outcome in outcomes]


class TestProposals:
    def test_they_depend_on_seed_and_number_alone(self) -> None:
        expected = architectures(search(wanted=6))
        for together in (2, 4, 6, 9):
            outcomes = search(wanted=6, together=together)
            assert [outcome.number for outcome in outcomes] == list(range(6))
            assert architectures(outcomes) == expected
        assert architectures(search(wanted=3)) == expected[:3]
        assert architectures(search(lambda proposal: -proposal.number, wanted=6)) == expected
        assert len({architecture.digest for architecture in expected}) == 6

    def test_another_seed_proposes_others(self) -> None:
        first, second = architectures(search(seed=0)), architectures(search(seed=1))
        assert not set(first) & set(second)

    def test_they_draw_from_no_global_generator(self) -> None:
        expected = architectures(search(seed=3))
        np.random.seed(5)
        torch.manual_seed(5)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        assert architectures(search(seed=3)) == expected
        np.testing.assert_array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_they_are_in_the_skeleton_and_asked_for_together(self) -> None:
        asked: list[int] = []

        def evaluate(proposals: Sequence[Proposal]) -> list[float]:
            asked.append(len(proposals))
            assert all(p.architecture.skeleton == SKELETON for p in proposals)
            return [0.1] * len(proposals)

        sampled_search("random", DartsSpace(), SKELETON, evaluate, wanted=7, seed=0, together=3)
        assert asked == [3, 3, 1]

    @pytest.mark.parametrize("decision", ["normal.2.op0", "normal.5.inputs", "reduce.4.op1"])
    def test_every_choice_is_equally_likely(self, decision: str) -> None:
        """Chi-square over 700 draws; the seed is fixed, so the test gives one answer for ever."""
        choices = DartsSpace().decisions()[decision]
        drawn = Counter(dict(a.decisions)[decision] for a in _many())
        assert set(drawn) == set(choices)
        assert chisquare([drawn[choice] for choice in choices]).pvalue > 0.01

    def test_decisions_are_drawn_independently(self) -> None:
        """Two decisions with the same choices: every pair is equally likely."""
        choices = DartsSpace().decisions()["normal.2.op0"]
        pairs = Counter(
            (dict(a.decisions)["normal.2.op0"], dict(a.decisions)["reduce.2.op0"]) for a in _many()
        )
        counts = [pairs[first, second] for first in choices for second in choices]
        assert chisquare(counts).pvalue > 0.01


@cache
def _many() -> tuple[Architecture, ...]:
    return tuple(architectures(search(wanted=700, seed=11, together=700)))


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (NonFiniteLossError("the loss is not finite (epoch 1)"), "the loss is not finite"),
            (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory"),
            (MemoryError(), "out of memory: MemoryError"),
        ],
    )
    def test_a_failure_is_an_outcome_and_another_takes_its_place(
        self, error: Exception, reason: str
    ) -> None:
        assert isinstance(error, FAILURES)
        outcomes = search(lambda proposal: error if proposal.number == 1 else 0.25, wanted=3)
        assert [outcome.number for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome.score for outcome in outcomes] == [0.25, None, 0.25, 0.25]
        assert [outcome.reason is None for outcome in outcomes] == [True, False, True, True]
        assert (outcomes[1].reason or "").startswith(reason)
        assert architectures(outcomes) == architectures(search(wanted=4))

    def test_half_may_fail(self) -> None:
        error = NonFiniteLossError("nan")
        outcomes = search(lambda p: error if p.number < 3 else 0.5, wanted=3, together=3)
        assert [outcome.score for outcome in outcomes] == [None, None, None, 0.5, 0.5, 0.5]

    @pytest.mark.parametrize("together", [1, 2, 3, 6])
    def test_too_many_end_the_search(self, together: int) -> None:
        tried: list[int] = []

        def evaluate(proposal: Proposal) -> float | Exception:
            tried.append(proposal.number)
            return 0.5 if proposal.number == 2 else NonFiniteLossError(f"nan in {proposal.number}")

        message = (
            "only 1 of 6 sampled networks could be trained and 3 are wanted; the last reason was: "
            "nan in 5"
        )
        with pytest.raises(NASError, match=message):
            search(evaluate, wanted=3, together=together)
        assert tried == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("error", [ValueError("a bug"), DataError("a broken image")])
    def test_any_other_error_passes_through(self, error: Exception) -> None:
        def evaluate(_: Proposal) -> float:
            raise error

        with pytest.raises(type(error), match=str(error)):
            search(evaluate)

    def test_scores_come_back_as_they_were_told(self) -> None:
        outcomes = search(lambda proposal: 0.125 * proposal.number, wanted=3, together=2)
        assert [outcome.score for outcome in outcomes] == [0.0, 0.125, 0.25]


def test_an_unknown_sampler() -> None:
    with pytest.raises(UnknownNameError, match="unknown sampler 'randon': did you mean 'random'"):
        search(sampler="randon")

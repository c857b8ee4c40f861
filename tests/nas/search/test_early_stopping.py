"""When a search ends early: the rules against hand-made histories, and in a real search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from searches import KilledError, Killer, Listener, make_search, outcome

from nas.data import ImageTask
from nas.errors import ConfigurationError
from nas.observer import EpochRecord
from nas.search.stopping import Stop, Stopping


def history(
    accuracies: Sequence[float], ages: Sequence[float] = (), skips: Sequence[float] = ()
) -> list[EpochRecord]:
    """Epochs 3, 4, ... as after a warm-up of three; what is not given never stops anything."""
    return [
        EpochRecord(
            3 + position,
            {
                "supernet/val_accuracy": accuracy,
                "genotype/age": ages[position] if ages else 0.0,
                "skip/normal": skips[position] if skips else 0.0,
            },
        )
        for position, accuracy in enumerate(accuracies)
    ]


def first_stop(rules: Stopping, records: list[EpochRecord]) -> Stop | None:
    """As a search asks: after every epoch, with all epochs so far."""
    stops = (rules.judge(records[: length + 1]) for length in range(len(records)))
    return next((stop for stop in stops if stop is not None), None)


RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


class TestPlateau:
    RULE = Stopping(plateau_epochs=3)

    def test_rising_goes_on(self) -> None:
        assert first_stop(self.RULE, history(RISING)) is None

    def test_three_epochs_without_a_rise(self) -> None:
        stop = first_stop(self.RULE, history([0.5, 0.6, 0.6, 0.59, 0.6, 0.9]))
        assert stop is not None
        assert (stop.rule, stop.epoch) == ("plateau", 7)  # the fifth: 0.6
        assert "3 epochs" in stop.reason
        assert "60.00%" in stop.reason

    def test_rises_below_a_tenth_of_a_percent_do_not_count(self) -> None:
        creeping = [0.5, 0.5004, 0.5008, 0.5009, 0.9]
        stop = first_stop(self.RULE, history(creeping))
        assert stop is not None
        assert stop.epoch == 6

    def test_many_small_rises_do_count_together(self) -> None:
        """Measured from the best that counted, not from the epoch before."""
        assert first_stop(self.RULE, history([0.5, 0.5006, 0.5012, 0.5018, 0.5024])) is None

    def test_a_fall_from_the_first_epoch_on(self) -> None:
        stop = first_stop(self.RULE, history([0.9, 0.8, 0.85, 0.89]))
        assert stop is not None
        assert stop.epoch == 6


def test_a_genotype_that_does_not_change() -> None:
    ages = [0, 1, 2, 0, 1, 2, 3, 4]
    stop = first_stop(Stopping(genotype_epochs=3), history(RISING, ages))
    assert stop == Stop("genotype", 9, "for 3 epochs the derived cells have not changed")


def test_too_many_skips() -> None:
    stop = first_stop(Stopping(skip_limit=2), history(RISING, skips=[0, 2, 2, 3, 1, 0, 0, 0]))
    assert stop == Stop("skips", 6, "the normal cell has 3 skip connections, more than 2")


def test_rules_compose_and_the_first_that_holds_is_named() -> None:
    rules = Stopping(plateau_epochs=2, genotype_epochs=4, skip_limit=2)
    flat, ages = [0.5] * 6, [0, 1, 2, 3, 4, 5]
    stop = first_stop(rules, history(flat, ages))
    assert stop is not None
    assert (stop.rule, stop.epoch) == ("plateau", 5)
    stop = first_stop(rules, history(RISING[:6], ages))
    assert stop is not None
    assert (stop.rule, stop.epoch) == ("genotype", 7)


def test_without_rules_or_records_nothing_stops() -> None:
    assert first_stop(Stopping(), history([0.5] * 9, [9] * 9, [8] * 9)) is None
    assert Stopping(plateau_epochs=1).judge([]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plateau_epochs": 0}, "at least 1 epoch, not 0"),
        ({"genotype_epochs": -1}, "at least 1 epoch, not -1"),
        ({"plateau_delta": 1.5}, "1.5 does not"),
        ({"skip_limit": -1}, "at least 0 skips, not -1"),
    ],
)
def test_impossible_rules(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Stopping(**values)  # type: ignore[arg-type]


FROZEN = {"architecture_learning_rate": 0.0, "architecture_weight_decay": 0.0, "epochs": 6}


def test_a_search_ends_where_its_cells_stay(few_digits: ImageTask) -> None:
    """Alphas that cannot move derive the same cells after every epoch: 0, 1, 2 epochs old."""
    result = make_search(few_digits, stopping=Stopping(genotype_epochs=2), **FROZEN).run()
    assert [record.metrics["genotype/age"] for record in result.records] == [0, 1, 2]
    assert result.stopped is not None
    assert (result.stopped.rule, result.stopped.epoch) == ("genotype", 2)
    assert len(result.mixing_history) == 3


def test_epochs_in_which_the_alphas_wait_do_not_count(few_digits: ImageTask) -> None:
    rules = Stopping(genotype_epochs=1, plateau_epochs=5)
    result = make_search(few_digits, warmup_epochs=3, stopping=rules, **FROZEN).run()
    assert [record.metrics["genotype/age"] for record in result.records] == [0, 0, 0, 0, 1]
    assert result.stopped is not None
    assert result.stopped.epoch == 4


def test_a_search_of_all_its_epochs_was_not_stopped(few_digits: ImageTask) -> None:
    assert make_search(few_digits).run().stopped is None


@pytest.mark.parametrize("epochs_before", [1, 2, 3])
def test_a_killed_search_stops_at_the_same_epoch(
    epochs_before: int, few_digits: ImageTask, tmp_path: Path
) -> None:
    """Also where it was killed after the epoch that ends it: it goes no further."""
    settings = {**FROZEN, "stopping": Stopping(genotype_epochs=2)}
    undisturbed = make_search(few_digits, **settings).run()  # type: ignore[arg-type]

    class DiesAfter(Killer):
        def on_epoch(self, record: EpochRecord) -> None:
            if record.epoch + 1 == epochs_before:
                raise KilledError

    with pytest.raises(KilledError):
        make_search(few_digits, **settings).run(tmp_path / "c", DiesAfter(10**9))  # type: ignore[arg-type]
    listener = Listener()
    resumed = make_search(few_digits, **settings).run(tmp_path / "c", listener)  # type: ignore[arg-type]
    assert resumed.stopped == undisturbed.stopped
    assert outcome(resumed) == outcome(undisturbed)
    assert len(listener.epochs) == 3 - epochs_before

"""A search is a pure function of its settings, however often it is killed and resumed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from searches import KilledError, Killer, Listener, make_search, outcome

import nas.loop
from nas.data import ImageTask
from nas.errors import CheckpointError
from nas.observer import VALIDATION
from nas.search import METHODS, BilevelSearch, Method
from nas.spaces.darts.supernet import SupernetConfig


@pytest.fixture(scope="module")
def undisturbed(few_digits: ImageTask) -> dict[str, dict[str, object]]:
    return {name: outcome(make_search(few_digits, name).run()) for name in METHODS}


def test_a_seed_decides_every_bit(
    few_digits: ImageTask, undisturbed: dict[str, dict[str, object]]
) -> None:
    torch.manual_seed(123)  # global randomness plays no part
    assert outcome(make_search(few_digits, "pcdarts").run()) == undisturbed["pcdarts"]


def test_another_seed_ends_elsewhere(
    few_digits: ImageTask, undisturbed: dict[str, dict[str, object]]
) -> None:
    other = outcome(make_search(few_digits, "darts", seed=1).run())
    for name in ("weights", "alphas", "running_mean", "mixing_history", "metrics"):
        assert other[name] != undisturbed["darts"][name]


@pytest.mark.parametrize(
    ("method", "every_batch"), [("pcdarts", False), *((method, True) for method in METHODS)]
)
def test_killed_and_resumed_ends_with_the_same_bits(
    method: str,
    every_batch: bool,
    few_digits: ImageTask,
    undisturbed: dict[str, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed twice, at random batches; saved after each epoch, or after each batch."""
    if every_batch:
        monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)
    steps = make_search(few_digits, method).steps
    assert steps >= 2
    kill = random.Random(f"{method}{every_batch}").randrange(2, 2 * steps)
    path = tmp_path / "search.safetensors"
    with pytest.raises(KilledError):
        make_search(few_digits, method).run(path, Killer(kill))
    with pytest.raises(KilledError):
        make_search(few_digits, method).run(path, Killer(1))
    listener = Listener()
    result = make_search(few_digits, method).run(path, listener)
    assert outcome(result) == undisturbed[method]
    if every_batch:
        assert len(listener.batches) == 2 * steps - kill + 1  # it did not begin anew


def test_killed_after_the_last_batch_of_an_epoch(
    few_digits: ImageTask,
    undisturbed: dict[str, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint stands between the last batch and the epoch's summary."""
    monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)

    class DiesInSummary(Method):
        def between_epochs(self, search: BilevelSearch, epoch: int) -> None:
            raise KilledError

    with pytest.raises(KilledError):
        make_search(few_digits, DiesInSummary()).run(tmp_path / "c")
    listener = Listener()
    search = make_search(few_digits, "darts")
    assert outcome(search.run(tmp_path / "c", listener)) == undisturbed["darts"]
    assert len(listener.batches) == search.steps  # of the second epoch only


def test_killed_in_a_validation(
    few_digits: ImageTask, undisturbed: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    """Of the second epoch, half way through its discretised supernet."""
    batches = len(make_search(few_digits).sources.each[0].evaluation)
    with pytest.raises(KilledError):
        make_search(few_digits).run(tmp_path / "c", Killer(4 * batches - 1, VALIDATION))
    assert outcome(make_search(few_digits).run(tmp_path / "c")) == undisturbed["darts"]


def test_a_finished_search_is_only_read(few_digits: ImageTask, tmp_path: Path) -> None:
    finished = make_search(few_digits, epochs=1).run(tmp_path / "c")
    listener = Listener()
    again = make_search(few_digits, epochs=1).run(tmp_path / "c", listener)
    assert outcome(again) == outcome(finished)
    assert listener.batches == []


@pytest.mark.parametrize(
    "other",
    [{"method": "darts-2nd"}, {"seed": 1}, {"learning_rate": 0.2}, {"epochs": 3},
     {"supernet": SupernetConfig(channels=4, cells=3)}],
)  # fmt: skip
def test_a_checkpoint_of_another_search_is_refused(
    other: dict[str, object], few_digits: ImageTask, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    with pytest.raises(KilledError):
        make_search(few_digits).run(path, Killer(3))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="another search"):
        make_search(few_digits, **other).run(path)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(few_digits: ImageTask, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        make_search(few_digits).run(tmp_path / "c", Killer(3))
    with pytest.raises(CheckpointError, match="another search"):
        make_search(replace(few_digits, digest="0" * 64)).run(tmp_path / "c")


def test_what_between_epochs_changes_is_in_the_checkpoint(
    few_digits: ImageTask, tmp_path: Path
) -> None:
    class Forgetful(Method):
        def between_epochs(self, search: BilevelSearch, epoch: int) -> None:
            with torch.no_grad():
                search.supernet.alphas.zero_()

    undisturbed = make_search(few_digits, Forgetful()).run()
    with pytest.raises(KilledError):
        make_search(few_digits, Forgetful()).run(tmp_path / "c", Killer(3))
    resumed = make_search(few_digits, Forgetful()).run(tmp_path / "c")
    assert outcome(resumed) == outcome(undisturbed)

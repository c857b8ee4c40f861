"""The last stages of a search, begun with the operation sets of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.data import ImageTask
from nas.errors import CheckpointError, ConfigurationError
from nas.observer import BatchEvent, Observer
from nas.search import BilevelSearch, SearchConfig, SearchResult, Stage, find_method
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.trained import load_supernet, save_supernet
from nas.transfer.supernet import WarmStart, WarmStartOptions

CONFIG = SearchConfig(
    supernet=SupernetConfig(channels=2, cells=3),
    epochs=1,
    batch_size=40,
    crop_padding=1,
    learning_rate=0.1,
    architecture_learning_rate=0.01,
    stages=(Stage(), Stage(5, 1, 0.4), Stage(3, 2, 0.7)),
)
PLAIN = SearchConfig(supernet=SupernetConfig(channels=2, cells=5), epochs=1, batch_size=40)


def search(
    task: ImageTask,
    start: WarmStart | None = None,
    config: SearchConfig = CONFIG,
    *,
    seed: int = 0,
    method: str = "pdarts",
) -> BilevelSearch:
    if start is not None:
        config = start.options.adapted(config)
    return BilevelSearch(
        task, find_method(method), config, seed=seed, device=torch.device("cpu"), start=start
    )


def start(source: Supernet, **options: object) -> WarmStart:
    return WarmStart(source, "0" * 64, WarmStartOptions(**options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def source(few_digits: ImageTask, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A whole search of another seed, its supernet read from a file."""
    result = search(few_digits, seed=5).run()
    path = tmp_path_factory.mktemp("source") / "s"
    save_supernet(path, result.supernet, {})
    object.__setattr__(result, "supernet", load_supernet(path))
    return result


def sets(supernet: Supernet) -> Tensor:
    return find_method("pdarts").mixing(supernet).operations > 0


def state(supernet: Supernet) -> dict[str, Tensor]:
    groups = supernet.groups()
    return {**groups.trunk, **groups.stem, **groups.classifier, **groups.architecture}


@pytest.mark.parametrize("stages", [1, 2])
def test_it_begins_with_exactly_the_sources_sets(
    stages: int, few_digits: ImageTask, source: SearchResult
) -> None:
    """As the source mixed them in the stages that are left, and with nothing else of it."""
    ours = search(few_digits, start(source.supernet, what="operations", stages=stages))
    assert torch.equal(sets(ours.supernet), source.mixing_history[-stages] > 0)
    assert (sets(ours.supernet).sum(-1) == {1: 3, 2: 5}[stages]).all()
    assert ours.supernet.config.cells == {1: 5, 2: 4}[stages]
    fresh = Supernet(ours.supernet.shape, ours.supernet.config, seed=0)
    for name, tensor in state(ours.supernet).items():
        assert torch.equal(tensor, state(fresh)[name]), name


@pytest.mark.parametrize(
    ("what", "moved"), [("weights", ()), ("both", ("alphas",)), ("alphas", ("alphas",))]
)
def test_it_loads_exactly_the_sources_tensors(
    what: str, moved: tuple[str, ...], few_digits: ImageTask, source: SearchResult
) -> None:
    ours = search(few_digits, start(source.supernet, what=what, stages=1)).supernet
    assert torch.equal(sets(ours), sets(source.supernet))
    fresh, theirs = state(Supernet(ours.shape, ours.config, seed=0)), state(source.supernet)
    groups = source.supernet.groups()
    expected = {*moved, *(() if what == "alphas" else (*groups.trunk, *groups.stem))}
    for name, tensor in state(ours).items():
        assert torch.equal(tensor, (theirs if name in expected else fresh)[name]), name


@pytest.mark.parametrize("stages", [1, 2])
def test_only_the_last_stages_run(stages: int, few_digits: ImageTask, source: SearchResult) -> None:
    result = search(few_digits, start(source.supernet, what="operations", stages=stages)).run()
    assert len(result.records) == stages
    assert ((result.mixing_history > 0).sum(-1) == torch.tensor([5, 3][-stages:])[:, None, None]
            .expand(-1, 2, 14)).all()  # fmt: skip
    # what went first is what the source dropped first, under the numbers of a whole search
    numbers = [(result.supernet.dropped == number).sum(-1).unique() for number in range(3)]
    assert [number.tolist() for number in numbers] == [[3], [3], [2]]
    assert torch.equal(result.supernet.dropped == 1, source.supernet.dropped == 1)
    # and it can serve the next one like its own source
    again = search(few_digits, start(result.supernet, what="operations", stages=2))
    assert torch.equal(sets(again.supernet), source.mixing_history[1] > 0)


class Killer(Observer):
    """Ends the search after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_batch(self, event: BatchEvent) -> None:
        self.left -= event.phase == "search"
        if self.left == 0:
            raise InterruptedError


@pytest.mark.parametrize("kill", [1, 3])
def test_killed_and_resumed_ends_with_the_same_bits(
    kill: int, few_digits: ImageTask, source: SearchResult, tmp_path: Path
) -> None:
    """In the first of the two stages, and in the second."""
    begin = start(source.supernet, what="operations", stages=2)
    undisturbed = search(few_digits, begin).run()
    with pytest.raises(InterruptedError):
        search(few_digits, begin).run(tmp_path / "c", Killer(kill))
    resumed = search(few_digits, begin).run(tmp_path / "c")
    assert resumed.genotype == undisturbed.genotype
    assert torch.equal(resumed.mixing_history, undisturbed.mixing_history)
    for name, tensor in undisturbed.supernet.state_dict().items():
        assert torch.equal(resumed.supernet.state_dict()[name], tensor), name


class TestRefused:
    def test_a_source_that_dropped_nothing(self, few_digits: ImageTask) -> None:
        whole = Supernet(few_digits.shape, SupernetConfig(channels=2, cells=5), seed=0)
        with pytest.raises(CheckpointError, match="has all its operations, and none that a search"):
            search(few_digits, start(whole, stages=1))

    def test_a_source_that_did_where_nothing_is_left_out(
        self, few_digits: ImageTask, source: SearchResult
    ) -> None:
        with pytest.raises(CheckpointError, match="can serve the last stages of another such"):
            search(few_digits, start(source.supernet), PLAIN, method="darts")

    def test_weights_of_another_size_but_not_operations(
        self, few_digits: ImageTask, source: SearchResult
    ) -> None:
        config = SearchConfig(
            supernet=SupernetConfig(channels=4, cells=3), epochs=1, batch_size=40,
            stages=CONFIG.stages,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match=r"its channels is 2, but .* is 4"):
            search(few_digits, start(source.supernet, stages=1), config)
        ours = search(few_digits, start(source.supernet, what="operations", stages=1), config)
        assert torch.equal(sets(ours.supernet), sets(source.supernet))

    def test_sets_of_another_number(self, few_digits: ImageTask, source: SearchResult) -> None:
        config = SearchConfig(
            supernet=CONFIG.supernet, epochs=1, batch_size=40, stages=(Stage(), Stage(4))
        )
        with pytest.raises(CheckpointError, match=r"has 4 operations on each edge, but .* with 3"):
            search(few_digits, start(source.supernet, what="operations", stages=1), config)

    def test_more_stages_than_the_source_had(
        self, few_digits: ImageTask, source: SearchResult
    ) -> None:
        config = SearchConfig(
            supernet=CONFIG.supernet, epochs=1, batch_size=40,
            stages=(Stage(), Stage(6), Stage(5), Stage(3)),
        )  # fmt: skip
        with pytest.raises(
            CheckpointError, match=r"was searched in 3 stages, so .* last 3 nothing"
        ):
            search(few_digits, start(source.supernet, what="operations", stages=3), config)

    @pytest.mark.parametrize("method", ["darts", "pcdarts"])
    def test_a_search_of_one_stage(self, method: str) -> None:
        with pytest.raises(ConfigurationError, match=r"last 1 stages cannot .* has 1 in all"):
            WarmStartOptions(stages=1).adapted(find_method(method).paper_config())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"what": "operations"}, "at least 1 runs, not 0"),
            ({"stages": -1}, "at least 1 runs, not -1"),
            ({"stages": 2}, "can begin with its 'operations', not with 'both'"),
            ({"stages": 2, "what": "weights"}, "its 'operations', not with 'weights'"),
        ],
    )
    def test_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            WarmStartOptions(**options)  # type: ignore[arg-type]


def test_the_stages_of_the_target_are_the_last_ones() -> None:
    adapted = WarmStartOptions(stages=1, learning_rate_scale=0.5).adapted(CONFIG)
    assert adapted.stages == CONFIG.stages[2:]
    assert adapted.supernet_of(0).cells == 5
    assert adapted.learning_rate == 0.05
    assert WarmStartOptions().adapted(CONFIG) == CONFIG

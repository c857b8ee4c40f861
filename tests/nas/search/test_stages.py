"""Searches in stages: what each edge keeps, what was dropped stays dropped, nothing else moves."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from searches import KilledError, Killer, exact, make_search, outcome, pair
from torch import Tensor

import nas.loop
from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import ImageTask
from nas.errors import CheckpointError, ConfigurationError
from nas.observer import EpochRecord
from nas.ops.mixed import EDGES, OPERATIONS, REDUCING, SKIP
from nas.search import METHODS, BilevelSearch, SearchConfig, SearchResult, Stage, find_method
from nas.search.pdarts import ProgressiveDarts
from nas.search.stages import drop_weakest, dropped_before
from nas.search.stopping import Stopping
from nas.spaces.darts import Genotype, skip_count
from nas.spaces.darts.supernet import NORMAL, REDUCE, Mixing, Supernet, SupernetConfig
from nas.trained import load_supernet, save_supernet

THREE = (Stage(8, 0, 0.2), Stage(5, 1, 0.4), Stage(3, 2, 0.7))
SHAPE = (2, len(EDGES), len(OPERATIONS))
CONVOLUTIONS = {4: (0, 1), 5: (2, 3), 6: (4,), 7: (5,)}  # of an operation, in the statistics


def staged(task: ImageTask, method: str = "pdarts", **settings: object) -> BilevelSearch:
    """Three stages of one epoch each."""
    return make_search(task, method, **{"stages": THREE, "epochs": 1, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(few_digits: ImageTask) -> SearchResult:
    return staged(few_digits).run()


def strongest(row: Sequence[float], allowed: set[int], keep: int) -> set[int]:
    """By sorting; the first of equals."""
    return set(sorted(allowed, key=lambda index: (-row[index], index))[:keep])


def left(dropped: Tensor) -> list[set[int]]:
    """The operations that each of the 28 edges has left."""
    return [
        {index for index, number in enumerate(row) if number == 0}
        for row in dropped.reshape(-1, len(OPERATIONS)).tolist()
    ]


class TestWhatIsDropped:
    @pytest.mark.parametrize("ties", [False, True])
    def test_all_but_the_strongest(self, ties: bool) -> None:
        draw = torch.Generator().manual_seed(3)
        dropped, allowed = torch.zeros(SHAPE, dtype=torch.uint8), [set(range(8))] * 28
        history = [dropped]
        for keep in (5, 3):
            weights = torch.rand(SHAPE, generator=draw)
            if ties:
                weights = (4 * weights).round() / 4
            dropped = drop_weakest(weights, dropped, keep)
            rows = weights.reshape(-1, 8).tolist()
            allowed = [strongest(row, own, keep) for row, own in zip(rows, allowed, strict=True)]
            assert left(dropped) == allowed
            assert dropped.dtype == torch.uint8
            history.append(dropped)
        for stage, before in enumerate(history, 1):
            assert torch.equal(dropped_before(dropped, stage), before)

    def test_of_a_search(self, undisturbed: SearchResult) -> None:
        """The sets of each stage, from the mixing weights at the end of the one before."""
        allowed = [set(range(8))] * 28
        for number, (mixing, stage) in enumerate(
            zip(undisturbed.mixing_history, THREE, strict=True), 1
        ):
            rows = mixing.reshape(-1, 8).tolist()
            assert [{index for index, w in enumerate(row) if w > 0} for row in rows] == allowed
            assert {len(own) for own in allowed} == {stage.operations}
            assert left(dropped_before(undisturbed.supernet.dropped, number)) == allowed
            torch.testing.assert_close(mixing.sum(-1), torch.ones(2, 14))
            keep = THREE[min(number, 2)].operations
            allowed = [strongest(row, own, keep) for row, own in zip(rows, allowed, strict=True)]

    def test_the_genotype_has_what_was_left(self, undisturbed: SearchResult) -> None:
        sets = left(undisturbed.supernet.dropped)
        for cell, genes in enumerate((undisturbed.genotype.normal, undisturbed.genotype.reduce)):
            for position, gene in enumerate(genes):
                edge = EDGES.index((gene.source, 2 + position // 2))
                assert OPERATIONS.index(gene.operation) in sets[14 * cell + edge]


class TestBetweenStages:
    def test_everything_begins_anew(self, few_digits: ImageTask) -> None:
        """But for the operations: a deeper supernet of the seed, optimisers without a past."""
        seen: list[tuple[int, int]] = []

        class Watched(ProgressiveDarts):
            def weight_mixing(self, search: BilevelSearch) -> Mixing:
                if search.batch == 0:
                    config = SupernetConfig(channels=2, cells=3 + THREE[search.epoch].deeper)
                    fresh = Supernet(search.supernet.shape, config, seed=0)
                    assert torch.equal(search.supernet.weights, fresh.weights)
                    assert not search.weight_optimiser.state
                    # this step's gradient came before: one step of Adam and no more
                    (state,) = search.architecture_optimiser.state.values()
                    assert state["step"] == 1
                    moved = (search.supernet.alphas - fresh.alphas).abs().max()
                    assert 0 < moved < 1.1 * search.config.architecture_learning_rate
                    seen.append((search.stage_number, search.supernet.config.cells))
                return super().weight_mixing(search)

        staged(few_digits, Watched()).run()  # type: ignore[arg-type]
        assert seen == [(0, 3), (1, 4), (2, 5)]

    def test_rates_and_frozen_epochs_restart(self, few_digits: ImageTask) -> None:
        search = staged(
            few_digits, stages=THREE[:2], epochs=3, warmup_epochs=2, learning_rate_end=0.0
        )
        result = search.run()
        rates = [record.metrics["lr"] for record in result.records]
        assert rates == pytest.approx([0.1, 0.075, 0.025] * 2)
        same = [torch.equal(*two) for two in pairwise(result.mixing_history)]
        assert same == [True, False, False, True, False]

    def test_rules_that_stop_judge_the_last_stage(self, few_digits: ImageTask) -> None:
        search = staged(few_digits, epochs=2, stopping=Stopping(skip_limit=1))
        metrics = {"skip/normal": 5.0, "genotype/age": 0.0}
        search.records = [EpochRecord(e, metrics) for e in range(4)]
        assert search.stop is None
        search.records.append(EpochRecord(4, metrics))
        assert search.stop is not None
        assert search.stop.epoch == 4


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    return str(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_a_dropped_operation_is_gone(method: str, backend: str, few_digits: ImageTask) -> None:
    """No weight, no gradient, no statistics; and no alpha brings it back."""
    search = make_search(few_digits, method, backend=backend, epochs=1, stages=THREE[2:])
    draw = torch.Generator().manual_seed(1)
    supernet = search.supernet
    supernet.dropped.copy_(drop_weakest(torch.rand(SHAPE, generator=draw), supernet.dropped, 3))
    dropped = supernet.dropped != 0
    with torch.no_grad():
        supernet.alphas[dropped] = 50.0
    assert not search.method.mixing(supernet).operations[dropped].any()

    train, validation = pair(search)
    gradients = search.method.architecture_gradients(search, train, validation)[0]
    assert not gradients[dropped].any()
    assert gradients[~dropped].any()

    before = supernet.running_mean.clone(), supernet.running_variance.clone()
    search.step((train, validation))
    for old, new in zip(before, (supernet.running_mean, supernet.running_variance), strict=True):
        for plan, was, now in cells(supernet, old, new):
            rows = dropped[REDUCE if plan.reduction else NORMAL]
            for edge, row in enumerate(rows.tolist()):
                for operation, places in CONVOLUTIONS.items():
                    same = torch.equal(was[edge, places, :], now[edge, places, :])
                    assert same == row[operation], (edge, operation)
    assert not weight_gradients(search, train)[dropped].any()
    assert not search.method.mixing(supernet).operations[dropped].any()


def cells(supernet: Supernet, old: Tensor, new: Tensor) -> list[tuple]:
    """Each cell's plan and the statistics of its convolutions, before and after."""
    sizes = [supernet.stem_statistics.size, *(plan.statistics.size for plan in supernet.plans)]
    pieces = zip(supernet.plans, old.split(sizes)[1:], new.split(sizes)[1:], strict=True)
    return [
        (plan, *(plan.statistics.unpack(piece)["convolutions"] for piece in both))
        for plan, *both in pieces
    ]


def weight_gradients(search: BilevelSearch, train: object) -> Tensor:
    """Size of the gradient of each operation's pointwise weights, [2, 14, 8]."""
    supernet = search.supernet
    loss = search.loss(train, search.method.mixing(supernet).detach(), update_statistics=False)  # type: ignore[arg-type]
    (flat,) = torch.autograd.grad(loss, [supernet.weights])
    assert flat.any()
    largest = torch.zeros(SHAPE)
    pieces = flat.split([packing.size for _, packing in supernet.weight_packings])
    for plan, piece in zip(supernet.plans, pieces[1:-1], strict=True):
        table = plan.weights.unpack(piece)["pointwise"].abs().amax((2, 3))
        kind = REDUCE if plan.reduction else NORMAL
        for operation, places in CONVOLUTIONS.items():
            largest[kind, :, operation] += table[:, places].amax(1)
    return largest


class TestSkips:
    def test_the_chance_falls_as_in_the_authors_code(self, few_digits: ImageTask) -> None:
        search = staged(few_digits, epochs=25, warmup_epochs=10)
        method = ProgressiveDarts()
        for search.epoch in range(75):
            start, epoch = (0.2, 0.4, 0.7)[search.epoch // 25], search.epoch % 25
            expected = (
                start * (24 - epoch) / 25 if epoch < 10 else start * math.exp(-0.2 * (epoch - 10))
            )
            assert method.skip_dropout(search) == pytest.approx(expected)

    def test_dropped_whole_or_made_up_for(self, few_digits: ImageTask) -> None:
        search, method = staged(few_digits, epochs=2, warmup_epochs=1), ProgressiveDarts()
        search.epoch = 1  # the chance is 0.2
        plain = method.mixing(search.supernet).operations
        ratios = []
        for search.batch in range(200):
            both = [
                (mixing(search).operations / plain).detach()
                for mixing in (method.weight_mixing, method.architecture_mixing)
            ]
            assert not torch.equal(*both)
            ratios += both
        ratio = torch.stack(ratios)
        skips = ratio[..., SKIP].clone()
        fixed = torch.zeros(2, 14, dtype=torch.bool)
        fixed[REDUCE, REDUCING] = True
        assert torch.equal(skips[:, fixed], torch.ones_like(skips[:, fixed]))
        moved = skips[:, ~fixed]
        assert set(moved.round(decimals=5).unique().tolist()) == {0.0, 1.25}
        assert float(moved.mean()) == pytest.approx(1, abs=0.02)
        ratio[..., SKIP] = 1
        assert torch.equal(ratio, torch.ones_like(ratio))
        again = method.weight_mixing(search).operations
        assert torch.equal(again, method.weight_mixing(search).operations)

    @pytest.mark.parametrize("seed", range(20))
    def test_the_limit_as_by_hand(self, seed: int, few_digits: ImageTask) -> None:
        search = staged(few_digits, skip_limit=2)
        draw = torch.Generator().manual_seed(seed)
        dropped = drop_weakest(torch.rand(SHAPE, generator=draw), search.supernet.dropped, 3)
        dropped[..., SKIP] = 0
        weights = torch.rand(SHAPE, generator=draw) * (dropped == 0)
        weights[..., SKIP] += 0.3
        mixing = Mixing(weights / weights.sum(-1, keepdim=True))
        found = ProgressiveDarts().derive(search, mixing)
        plain = search.supernet.derive(mixing)
        assert skip_count(plain.normal) > 2 >= skip_count(found.normal)
        assert found.reduce == plain.reduce
        normal = mixing.operations[NORMAL].tolist()
        assert found == Genotype(limited(normal, 2), plain.reduce)


def limited(rows: list[list[float]], limit: int) -> tuple:
    """The authors' procedure in plain lists: one operation an edge, two edges a node, skips ruled
    out by the smallest weight."""
    from nas.spaces.darts import Gene

    rows = [[0.0, *row[1:]] for row in rows]
    while True:
        genes, edges = [], []
        for node in range(2, 6):
            own = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
            best = sorted(own, key=lambda edge: -max(rows[edge]))[:2]
            for edge in best:
                operation = rows[edge].index(max(rows[edge]))
                genes.append(Gene(OPERATIONS[operation], EDGES[edge][0]))
                edges.append((edge, operation))
        skips = [(rows[edge][SKIP], edge) for edge, operation in edges if operation == SKIP]
        if len(skips) <= limit:
            return tuple(genes)
        rows[min(skips)[1]][SKIP] = 0.0


@pytest.mark.parametrize("every_batch", [False, True])
def test_killed_in_every_stage_and_resumed(
    every_batch: bool,
    few_digits: ImageTask,
    undisturbed: SearchResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if every_batch:
        monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)
    steps = staged(few_digits).steps
    draw = random.Random(every_batch)
    for _ in range(2):
        with pytest.raises(KilledError):
            staged(few_digits).run(tmp_path / "c", Killer(draw.randrange(2, steps + 2)))
    with pytest.raises(KilledError):
        staged(few_digits).run(tmp_path / "c", Killer(1))
    assert outcome(staged(few_digits).run(tmp_path / "c")) == outcome(undisturbed)


class TestFiles:
    def test_the_sets_are_in_it(self, undisturbed: SearchResult, tmp_path: Path) -> None:
        save_supernet(tmp_path / "s", undisturbed.supernet, {})
        loaded = load_supernet(tmp_path / "s")
        assert exact(loaded.dropped) == exact(undisturbed.supernet.dropped)
        assert loaded.signature() == undisturbed.supernet.signature()
        assert loaded.signature()["pruned"] is True
        method = find_method("pdarts")
        assert torch.equal(
            method.mixing(loaded).operations, method.mixing(undisturbed.supernet).operations
        )

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ((0, 3), 1, "1 edges on which all operations were dropped"),
            ((1, 2, slice(1, 8)), 2, "1 edges on which all operations were dropped"),
            ((0, 0, 0), 255, "after stage 255, but there are only 8"),
        ],
    )
    def test_impossible_sets_are_refused(
        self, place: tuple, value: int, message: str, undisturbed: SearchResult, tmp_path: Path
    ) -> None:
        save_supernet(tmp_path / "s", undisturbed.supernet, {})
        checkpoint = load_checkpoint(tmp_path / "s")
        tensors = dict(checkpoint.tensors)
        tensors["dropped"][place] = value
        save_checkpoint(tmp_path / "s", Checkpoint(tensors, checkpoint.values))
        with pytest.raises(CheckpointError, match=message):
            load_supernet(tmp_path / "s")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"operations": 2}, "at least 3 operations in a stage, not 2"),
        ({"deeper": -1}, "at least 0 cells more, not -1"),
        ({"skip_dropout": 1.0}, "from 0 to below 1, not 1.0"),
        ({"skip_dropout": math.nan}, "from 0 to below 1, not nan"),
    ],
)
def test_impossible_stages_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Stage(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [(), (5, 5), (3, 5), (None, None), (5, None)])
def test_stages_lose_operations(counts: tuple[int | None, ...]) -> None:
    with pytest.raises(ConfigurationError, match="fewer operations than the one before"):
        SearchConfig(stages=tuple(Stage(count) for count in counts))

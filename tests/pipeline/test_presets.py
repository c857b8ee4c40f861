"""Scales of a job, against the numbers of the papers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nas.errors import UnknownNameError
from nas.search import METHODS, find_method
from nas.spaces import DartsSpace
from pipeline.presets import PRESETS, find_preset
from pipeline.settings import CompareSettings


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown preset 'quik': did you mean 'quick'"):
        find_preset("quik")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_name_and_says_what_it_is(name: str) -> None:
    preset = find_preset(name)
    assert preset is PRESETS[name]
    assert len(preset.summary) > 20
    assert preset.channels % 2 == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["paper-cifar", "paper-imagenet"])
def test_the_papers_search_is_left_as_it_is(name: str, method: str) -> None:
    assert find_preset(name).search(find_method(method)) == find_method(method).paper_config()


def test_the_papers_searches() -> None:
    """DARTS section 3.1: 8 cells, 16 channels, 50 epochs, batch 64; PC-DARTS 4.2: K = 4, batch
    256, 15 epochs of warm-up."""
    darts = find_preset("paper-cifar").search(find_method("darts"))
    assert (darts.supernet.cells, darts.supernet.channels, darts.epochs) == (8, 16, 50)
    assert (darts.batch_size, darts.learning_rate, darts.warmup_epochs) == (64, 0.025, 0)
    pcdarts = find_preset("paper-cifar").search(find_method("pcdarts"))
    assert (pcdarts.supernet.partial, pcdarts.batch_size, pcdarts.warmup_epochs) == (4, 256, 15)


def test_the_papers_cifar_network() -> None:
    """DARTS section 3.2: 20 cells, 36 channels, 600 epochs, batch 96, cutout, drop-path 0.2,
    auxiliary weight 0.4."""
    preset = find_preset("paper-cifar")
    assert (preset.cells, preset.channels, preset.threads, preset.largest) == (20, 36, None, None)
    recipe = preset.training
    assert (recipe.epochs, recipe.batch_size, recipe.cutout) == (600, 96, 16)
    assert (recipe.drop_path, recipe.auxiliary_weight, recipe.learning_rate) == (0.2, 0.4, 0.025)


def test_the_papers_imagenet_network() -> None:
    """DARTS section 3.2: 14 cells, 48 channels, 250 epochs, batch 128, rate 0.1 times 0.97 an
    epoch, weight decay 3e-5."""
    preset = find_preset("paper-imagenet")
    assert (preset.cells, preset.channels) == (14, 48)
    recipe = preset.training
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (250, 128, 3e-5)
    assert recipe.learning_rate_at(2) == pytest.approx(0.1 * 0.97 * 0.97)


@pytest.mark.parametrize("method", METHODS)
class TestQuick:
    def test_it_is_small(self, method: str) -> None:
        preset = find_preset("quick")
        config = preset.search(find_method(method))
        assert config.supernet.channels * config.supernet.cells <= 32
        assert config.epochs <= 10
        assert (preset.largest, preset.threads) == (14, 1)

    def test_it_keeps_what_makes_the_method(self, method: str) -> None:
        paper = find_method(method).paper_config()
        quick = find_preset("quick").search(find_method(method))
        assert (quick.supernet.partial > 1) == (paper.supernet.partial > 1)
        assert quick.supernet.edge_normalisation == paper.supernet.edge_normalisation
        share = paper.warmup_epochs / paper.epochs
        assert quick.warmup_epochs == pytest.approx(share * quick.epochs, abs=0.5)
        assert quick.architecture_weight_decay == paper.architecture_weight_decay
        assert quick.gradient_clip == paper.gradient_clip
        kept = [(stage.operations, stage.skip_dropout) for stage in quick.stages]
        assert kept == [(stage.operations, stage.skip_dropout) for stage in paper.stages]


def test_stages_of_pdarts_grow_by_a_cell_in_quick() -> None:
    config = find_preset("quick").search(find_method("pdarts"))
    assert [config.supernet_of(stage).cells for stage in range(3)] == [4, 5, 6]


def test_quick_builds_its_network_in_the_space() -> None:
    from nas.architecture import Skeleton

    preset = find_preset("quick")
    space = DartsSpace()
    first = {name: choices[0] for name, choices in space.decisions().items()}
    skeleton = Skeleton("cifar", preset.channels, preset.cells)
    assert space.architecture(first, skeleton).skeleton == skeleton


@pytest.mark.parametrize(("images", "epochs"), [(64, 150), (640, 15), (6399, 2), (60000, 2)])
def test_a_small_set_is_gone_through_more_often(images: int, epochs: int) -> None:
    quick = PRESETS["quick"]
    settings = CompareSettings(quick.training, 1, 0, "nas-some", quick.least_steps)
    task = SimpleNamespace(splits=SimpleNamespace(train=range(images)))
    assert settings.training_for(task).epochs == epochs  # type: ignore[arg-type]
    as_asked = CompareSettings(quick.training, 1, 0, "nas-some")
    assert as_asked.training_for(task) == quick.training  # type: ignore[arg-type]

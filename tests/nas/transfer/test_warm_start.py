"""A search that begins with another data set's supernet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.data import ImageTask, TaskShape
from nas.errors import CheckpointError, ConfigurationError, UnknownNameError
from nas.randomness import generator
from nas.search import METHODS, BilevelSearch, SearchConfig, find_method
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.transfer.supernet import WarmStart, WarmStartOptions, adapt_channels

PCDARTS = SupernetConfig(channels=4, cells=3, partial=2, edge_normalisation=True)
DARTS = SupernetConfig(channels=4, cells=3)
COLOUR = TaskShape(3, 8, 8, 4)


def mixing_of(supernet: Supernet) -> object:
    return find_method("darts").mixing(supernet)


def draw(shape: TaskShape, seed: int = 0, count: int = 6) -> Tensor:
    size = (count, shape.channels, shape.height, shape.width)
    return torch.randn(size, generator=generator(seed, "images"))


def trained(shape: TaskShape = COLOUR, config: SupernetConfig = PCDARTS) -> Supernet:
    """A supernet unlike any fresh one: alphas decided, statistics moved."""
    supernet = Supernet(shape, config, seed=7, backend="eager")
    with torch.no_grad():
        for parameter in supernet.architecture_parameters():
            parameter.mul_(1000)
        supernet(draw(shape, 1) + 0.5, mixing_of(supernet))
    return supernet


def fresh(shape: TaskShape = COLOUR, config: SupernetConfig = PCDARTS) -> Supernet:
    return Supernet(shape, config, seed=0, backend="eager")


def start(source: Supernet, **options: object) -> WarmStart:
    return WarmStart(source, "0" * 64, WarmStartOptions(**options))  # type: ignore[arg-type]


def same_head(target: Supernet, source: Supernet) -> None:
    for name, tensor in target.groups().classifier.items():
        tensor.copy_(source.groups().classifier[name])


def parts(supernet: Supernet) -> dict[str, dict[str, Tensor]]:
    groups = supernet.groups()
    return {
        part: {name: tensor.clone() for name, tensor in getattr(groups, part).items()}
        for part in ("trunk", "stem", "classifier", "architecture", "operations")
    }


def assert_equal(part: str, one: Supernet, other: Supernet) -> None:
    ours, theirs = parts(one)[part], parts(other)[part]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), (part, name)


@pytest.mark.parametrize("config", [DARTS, PCDARTS])
class TestGroups:
    def test_every_element_is_in_exactly_one_group(self, config: SupernetConfig) -> None:
        supernet = trained(config=config)
        groups = parts(supernet).values()
        held = sum(tensor.numel() for group in groups for tensor in group.values())
        assert held == sum(tensor.numel() for tensor in supernet.state_dict().values())

    def test_what_is_written_the_supernet_has(self, config: SupernetConfig) -> None:
        supernet = fresh(config=config)
        groups = supernet.groups()
        for part in ("trunk", "stem", "classifier", "architecture", "operations"):
            for tensor in getattr(groups, part).values():
                tensor.fill_(7)
        assert all((tensor == 7).all() for tensor in supernet.state_dict().values())

    def test_the_classifier_turns_features_into_scores(self, config: SupernetConfig) -> None:
        supernet, images = trained(config=config), draw(COLOUR)
        classifier, mixing = supernet.linear_classifier(), mixing_of(supernet)
        classifier.bias.copy_(torch.arange(4.0))
        with torch.no_grad():
            scores = supernet(images, mixing, update_statistics=False)
            ours = supernet.features(images, mixing) @ classifier.matrix + classifier.bias
        assert torch.equal(ours, scores)


class TestWhatMoves:
    def test_everything_but_the_classifier(self) -> None:
        source, target = trained(), fresh()
        start(source).apply(target)
        for part in ("trunk", "stem", "architecture"):
            assert_equal(part, target, source)
        assert_equal("classifier", target, fresh())

    def test_weights_alone(self) -> None:
        source, target = trained(), fresh()
        start(source, what="weights").apply(target)
        assert_equal("trunk", target, source)
        assert_equal("architecture", target, fresh())

    def test_alphas_alone_cooled(self) -> None:
        source, target = trained(), fresh()
        start(source, what="alphas", alpha_temperature=4.0).apply(target)
        for part in ("trunk", "stem", "classifier"):
            assert_equal(part, target, fresh())
        assert torch.equal(target.alphas, source.alphas / 4)
        assert target.betas is not None
        assert source.betas is not None
        assert torch.equal(target.betas, source.betas / 4)

    def test_the_source_stays_as_it_is(self) -> None:
        source = trained()
        before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        target = fresh()
        start(source).apply(target)
        with torch.no_grad():
            target.weights.zero_()
            target.running_mean.zero_()
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("config", [DARTS, PCDARTS])
@pytest.mark.parametrize("training", [True, False])
def test_the_first_forward_pass_is_the_sources(config: SupernetConfig, training: bool) -> None:
    source, target = trained(config=config).train(training), fresh(config=config).train(training)
    start(source).apply(target)
    same_head(target, source)
    images = draw(COLOUR)
    with torch.no_grad():
        ours = target(images, mixing_of(target), update_statistics=False)
        theirs = source(images, mixing_of(source), update_statistics=False)
    assert torch.equal(ours, theirs)


class TestImageChannels:
    @pytest.mark.parametrize("evaluation", [False, True])
    def test_a_grey_image_gives_what_its_colour_copy_gave(self, evaluation: bool) -> None:
        source, target = trained().double(), fresh(replace(COLOUR, channels=1)).double()
        start(source).apply(target)
        same_head(target, source)
        source.train(not evaluation)
        target.train(not evaluation)
        grey = draw(target.shape).double()
        with torch.no_grad():
            ours = target(grey, mixing_of(target), update_statistics=False)
            theirs = source(grey.expand(-1, 3, -1, -1), mixing_of(source), update_statistics=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_a_colour_copy_gives_what_its_grey_image_gave(self) -> None:
        source = trained(replace(COLOUR, channels=1)).double()
        target = fresh().double()
        start(source).apply(target)
        same_head(target, source)
        grey = draw(source.shape).double()
        with torch.no_grad():
            ours = target(grey.expand(-1, 3, -1, -1), mixing_of(target), update_statistics=False)
            theirs = source(grey, mixing_of(source), update_statistics=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_any_axis_and_number(self) -> None:
        filters = torch.arange(24.0).reshape(2, 3, 4)
        adapted = adapt_channels(filters, 1, 6)
        assert adapted.shape == (2, 6, 4)
        torch.testing.assert_close(adapted.sum(1), filters.sum(1))
        assert adapt_channels(filters, 1, 3) is filters


@pytest.mark.parametrize("method", METHODS)
def test_other_sizes_and_classes(few_digits: ImageTask, method: str) -> None:
    """Grey 8x8 images of ten classes, from a source of colour, 12x20 pixels and four classes."""
    source = trained(TaskShape(3, 12, 20, 4))
    config = SearchConfig(supernet=PCDARTS, epochs=1, batch_size=40, crop_padding=1)
    search = BilevelSearch(
        few_digits, find_method(method), config, seed=0, device=torch.device("cpu"),
        start=start(source), backend="eager",
    )  # fmt: skip
    assert_equal("trunk", search.supernet, source)
    assert search.supernet.linear_classifier().bias.shape == (10,)
    assert not search.weight_optimiser.state
    assert not search.architecture_optimiser.state
    result = search.run()
    assert not torch.equal(parts(result.supernet)["trunk"]["running_mean"],
                           parts(source)["trunk"]["running_mean"])  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (replace(PCDARTS, channels=8), "its channels is 4, but that of the search is 8"),
            (replace(PCDARTS, cells=4), "its cells is 3, but that of the search is 4"),
            (replace(PCDARTS, partial=1), "its partial is 2, but that of the search is 1"),
            (replace(PCDARTS, edge_normalisation=False), "edge normalisation is True, but .* Fal"),
        ],
    )
    @pytest.mark.parametrize("what", ["weights", "alphas", "both"])
    def test_of_another_size(self, config: SupernetConfig, message: str, what: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            start(trained(), what=what).apply(fresh(config=config))

    @pytest.mark.parametrize("entry", ["space", "operations"])
    def test_of_another_space(self, entry: str) -> None:
        source, target = trained(), fresh()
        signature = {**source.signature(), entry: ["conv", "skip"]}
        source.signature = lambda: signature  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match=rf"its {entry} is \['conv', 'skip'\], but that"):
            start(source).apply(target)

    def test_nothing_is_written_where_it_is_refused(self) -> None:
        target = fresh(config=replace(PCDARTS, cells=4))
        with pytest.raises(CheckpointError):
            start(trained()).apply(target)
        for part in ("trunk", "stem", "architecture"):
            assert_equal(part, target, fresh(config=replace(PCDARTS, cells=4)))

    @pytest.mark.parametrize("temperature", [0.5, 0.0, float("nan"), float("inf")])
    def test_temperatures(self, temperature: float) -> None:
        with pytest.raises(ConfigurationError, match=r"temperature of the alphas .* at least 1"):
            WarmStartOptions(alpha_temperature=temperature)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_learning_rates(self, scale: float) -> None:
        with pytest.raises(ConfigurationError, match="scaled by a number above 0"):
            WarmStartOptions(learning_rate_scale=scale)

    def test_parts(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'alphas'"):
            WarmStartOptions(what="alpha")


def test_the_learning_rates_of_the_weights_are_scaled_and_no_others() -> None:
    config = SearchConfig()
    scaled = WarmStartOptions(learning_rate_scale=0.1).adapted(config)
    assert scaled.learning_rate == config.learning_rate * 0.1
    assert scaled.learning_rate_end == config.learning_rate_end * 0.1
    assert scaled.architecture_learning_rate == config.architecture_learning_rate


def test_a_checkpoint_of_another_beginning_is_refused(
    few_digits: ImageTask, tmp_path: Path
) -> None:
    config = SearchConfig(supernet=DARTS, epochs=1, batch_size=40, crop_padding=1)

    def search(begin: WarmStart | None) -> BilevelSearch:
        return BilevelSearch(
            few_digits, find_method("darts"), config, seed=0, device=torch.device("cpu"),
            start=begin,
        )  # fmt: skip

    begin = start(trained(config=DARTS))
    search(begin).run(tmp_path / "c")
    with pytest.raises(CheckpointError, match="another search"):
        search(None).run(tmp_path / "c")
    with pytest.raises(CheckpointError, match="another search"):
        search(replace(begin, digest="1" * 64)).run(tmp_path / "c")
    search(begin).run(tmp_path / "c")

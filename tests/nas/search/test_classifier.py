"""A classifier fitted to features: against scikit-learn's, and where a warm search begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from searches import CPU, SUPERNETS, KilledError, Killer, exact, outcome
from sklearn.linear_model import LogisticRegression

import nas.loop
from nas.data import Batch, ImageTask, TaskShape
from nas.randomness import generator
from nas.search import BilevelSearch, SearchConfig, find_method
from nas.search.classifier import PENALTY, fit_classifier, fit_heads
from nas.spaces.darts.supernet import Supernet
from nas.transfer.supernet import WarmStart, WarmStartOptions

SHAPE = TaskShape(1, 8, 8, 5)


def test_it_is_the_regression_of_scikit_learn() -> None:
    draw = generator(0, "features")
    labels = torch.randint(3, (90,), generator=draw)
    features = torch.randn(90, 4, generator=draw) * torch.tensor([1.0, 9.0, 0.1, 3.0]) + 5
    features[:, 2] += labels
    matrix, bias = fit_classifier(features, labels, 3)
    scaled = (features - features.mean(0)) / features.std(0, unbiased=False)
    # its objective is the sum of the losses times C, plus half the squared weights
    model = LogisticRegression(C=1 / (2 * PENALTY * 90), tol=1e-8, max_iter=1000)
    expected = model.fit(scaled.numpy(), labels.numpy()).predict_proba(scaled.numpy())
    ours = (features @ matrix + bias).softmax(-1)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


def test_a_class_without_images_and_a_feature_that_never_varies() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.9]])
    matrix, bias = fit_classifier(features, torch.tensor([0, 2, 0, 2]), 3)
    assert torch.isfinite(matrix).all()
    assert (features @ matrix + bias).argmax(-1).tolist() == [0, 2, 0, 2]


def test_each_head_is_fitted_to_its_own_set_and_nothing_else_moves() -> None:
    supernet = Supernet(SHAPE, SUPERNETS["darts"], seed=0, backend="eager").train()
    mixing = find_method("darts").mixing(supernet).detach()
    untouched = Supernet(SHAPE, SUPERNETS["darts"], seed=0, backend="eager")
    heads = (slice(0, 3), slice(3, 5))
    sets = []
    for number, head in enumerate(heads):
        images = torch.randn(40, 1, 8, 8, generator=generator(number, "images"))
        labels = torch.arange(40) % (head.stop - head.start)
        sets.append([Batch(images[i : i + 20], labels[i : i + 20], head) for i in (0, 20)])
    classifier = supernet.linear_classifier()
    fit_heads(classifier, lambda images: supernet.features(images, mixing), sets)
    for own, head in zip(sets, heads, strict=True):
        features = torch.cat([supernet.features(b.images, mixing) for b in own]).detach()
        matrix, bias = fit_classifier(
            features, torch.cat([b.labels for b in own]), head.stop - head.start
        )
        torch.testing.assert_close(classifier.matrix[:, head], matrix)
        torch.testing.assert_close(classifier.bias[head], bias)
    for group in supernet.groups().classifier.values():
        group.zero_()
    for group in untouched.groups().classifier.values():
        group.zero_()
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(supernet.state_dict()[name], tensor), name


def warm_search(task: ImageTask, what: str = "both") -> BilevelSearch:
    """From a supernet of other images; nothing of its weights learns any further."""
    source = Supernet(SHAPE, SUPERNETS["darts"], seed=7, backend="eager")
    config = SearchConfig(
        supernet=SUPERNETS["darts"],
        epochs=2,
        batch_size=40,
        crop_padding=1,
        learning_rate=1e-9,
        learning_rate_end=1e-9,
    )
    return BilevelSearch(
        task,
        find_method("darts"),
        config,
        seed=0,
        device=CPU,
        start=WarmStart(source, "0" * 64, WarmStartOptions(what=what)),
    )


@pytest.mark.parametrize(("what", "fits"), [("both", True), ("weights", True), ("alphas", False)])
def test_a_search_fits_it_where_weights_move(few_digits: ImageTask, what: str, fits: bool) -> None:
    search = warm_search(few_digits, what)
    bias = search.supernet.linear_classifier().bias
    drawn = bias.clone()
    result = search.run()
    assert (not torch.allclose(bias, drawn)) == fits
    first = result.records[0].metrics["supernet/val_accuracy"]
    assert (first > 0.3) == fits  # of ten classes, by features of random weights


def test_killed_in_the_first_epoch_it_is_not_fitted_anew(
    few_digits: ImageTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.loop, "CHECKPOINT_SECONDS", 0.0)
    undisturbed = outcome(warm_search(few_digits).run())
    with pytest.raises(KilledError):
        warm_search(few_digits).run(tmp_path / "c", Killer(2))
    resumed = warm_search(few_digits)
    monkeypatch.setattr("nas.search.bilevel.fit_heads", None)  # must not be called
    result = resumed.run(tmp_path / "c")
    assert outcome(result) == undisturbed
    assert exact(result.supernet.weights) == undisturbed["weights"]

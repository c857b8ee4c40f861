"""The linear baseline equals scikit-learn's own, and sees no split but the one asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nas.data import ImageTask, TensorImages, fit_linear, load_task
from nas.data.linear import INVERSE_PENALTY, MAX_ITERATIONS


def test_digits_equal_a_pipeline_of_scikit_learn(digits: ImageTask) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def pixels(split: torch.Tensor) -> object:
        return digits.images.gather(split).flatten(1).numpy() / 255

    train, test = digits.splits.train, digits.splits.test
    reference = make_pipeline(
        StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS)
    ).fit(pixels(train), digits.labels[train])
    expected = reference.score(pixels(test), digits.labels[test])
    accuracy = fit_linear(digits).accuracy(digits, "test")
    assert accuracy == pytest.approx(expected, abs=0.006)  # two images of 359
    assert accuracy > 0.88


def test_only_the_training_split_is_fitted(digits: ImageTask) -> None:
    pixels = digits.images.gather(torch.arange(len(digits.labels))).clone()
    labels = digits.labels.clone()
    for hidden in (digits.splits.val, digits.splits.test):
        pixels[hidden], labels[hidden] = 7, 3
    altered = replace(digits, images=TensorImages(pixels), labels=labels)
    ours, theirs = fit_linear(digits), fit_linear(altered)
    assert (ours.weight == theirs.weight).all()
    assert theirs.accuracy(digits, "val") == ours.accuracy(digits, "val")


def test_two_classes_and_large_colour_images(
    write_digits: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_digits(tmp_path / "set", 40, classes=2, side=80, mode="RGB")
    task = load_task(f"folder:{folder}", root=tmp_path)
    assert task.images.shape == (3, 80, 80)
    model = fit_linear(task)
    assert model.weight.shape == (2, 3 * 32 * 32)
    assert model.accuracy(task, "test") == 1.0  # noughts and ones

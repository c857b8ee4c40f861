"""What a data set leaves in its sketch, and what comes back from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sketches import blobs, noise_task, sketch_of, task_of
from torch import Tensor

from nas.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nas.data import load_task
from nas.errors import CheckpointError, ConfigurationError, DataError
from nas.observer import Observer
from nas.transfer.otdd import Embedding, describe, distance, load_sketch, pixels, save_sketch


class Warnings(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_warning(self, tag: str, message: str) -> None:
        assert tag == "dropped_classes"
        self.messages.append(message)


class TestDescribe:
    def test_statistics_are_those_of_the_training_and_validation_images(
        self, tmp_path: Path
    ) -> None:
        task = load_task("digits", root=tmp_path)
        sketch = describe(task, pixels(8, 1), 0, points=200)
        pool = torch.cat([task.splits.train, task.splits.val])
        vectors = task.images.gather(pool).flatten(1).double().numpy() / 255
        for label in (0, 7):
            own = vectors[(task.labels[pool] == label).numpy()]
            factor = sketch.class_factors[label].double().numpy()
            assert int(sketch.counts[label]) == len(own)
            np.testing.assert_allclose(sketch.means[label].numpy(), own.mean(0), atol=1e-6)
            np.testing.assert_allclose(factor.T @ factor, np.cov(own.T), atol=1e-6)
        assert torch.bincount(sketch.labels).tolist() == [20] * 10
        # the points are images, under their own labels
        rounded = torch.from_numpy(vectors).float().round(decimals=4).tolist()
        seen = {(*row, k) for row, k in zip(rounded, task.labels[pool].tolist(), strict=True)}
        for row, k in zip(sketch.points, sketch.labels.tolist(), strict=True):
            assert (*row.round(decimals=4).tolist(), k) in seen

    def test_seed_decides_the_points_alone(self) -> None:
        task = noise_task(0)
        first, again, other = (describe(task, pixels(), s, points=6) for s in (0, 0, 1))
        assert first.digest == again.digest != other.digest
        assert torch.equal(first.factors, other.factors)
        assert not torch.equal(first.points, other.points)

    def test_a_class_of_one_image_is_left_out_and_said(self) -> None:
        warnings = Warnings()
        whole, lacking = noise_task(0, (8, 1, 8)), noise_task(0, (8, 8))
        sketch = describe(whole, pixels(), 0, observer=warnings)
        assert sketch.classes == ("class 0", "class 2")
        assert sketch.labels.unique().tolist() == [0, 1]
        assert sketch.counts.tolist() == [8, 8]
        assert len(warnings.messages) == 1
        assert "1 class(es) of 'noise 0' are left out" in warnings.messages[0]
        assert "class 1" in warnings.messages[0]
        assert distance(sketch, describe(lacking, pixels(), 0)) >= 0

    def test_one_class_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"'noise 0' has 1 class\(es\) of at least two"):
            describe(noise_task(0, (8, 1)), pixels(), 0)

    def test_nan_is_refused(self) -> None:
        def broken(images: Tensor) -> Tensor:
            vectors = images.float().flatten(1)
            vectors[3] = torch.nan
            return vectors

        with pytest.raises(DataError, match=r"'mine' of 1 image.* of 'noise 0' is NaN"):
            describe(noise_task(0), Embedding("mine", "0", broken), 0)

    def test_an_embedding_of_another_shape_is_refused(self) -> None:
        whole = Embedding("maps", "0", lambda images: images.float())
        with pytest.raises(ConfigurationError, match=r"'maps' gave \(24, 1, 8, 8\) for 24 images"):
            describe(noise_task(0), whole, 0)

    def test_fewer_points_than_classes_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="2 points cannot show 3 classes"):
            describe(noise_task(0), pixels(), 0, points=2)

    def test_sizes_and_channels_may_differ(self) -> None:
        """A colour image of equal channels is a grey one, a large flat one a small one."""
        flat, labels = noise_task(0, side=1).images.gather(torch.arange(24)), noise_task(0).labels
        grey = task_of(flat.expand(-1, -1, 8, 8), labels)
        colour = task_of(flat.expand(-1, 3, 8, 8), labels)
        large = task_of(flat.expand(-1, -1, 32, 20), labels)
        for embedding in (pixels(8, 3), pixels(8, 1)):
            sketch = describe(grey, embedding, 0)
            for other in (colour, large):
                assert distance(sketch, describe(other, embedding, 0)) < 0.02


class TestOnDisk:
    def test_comes_back(self, tmp_path: Path) -> None:
        sketch = describe(noise_task(0), pixels(), 3)
        path = tmp_path / "sketch.safetensors"
        save_sketch(path, sketch)
        loaded = load_sketch(path)
        assert loaded.digest == sketch.digest
        assert (loaded.name, loaded.seed, loaded.classes) == (
            sketch.name, sketch.seed, sketch.classes,
        )  # fmt: skip
        other = describe(noise_task(1), pixels(), 3)
        assert distance(loaded, other) == distance(sketch, other)

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        save_checkpoint(path, Checkpoint({}, {"kind": "network"}))
        with pytest.raises(CheckpointError, match="holds no data set sketch"):
            load_sketch(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"labels": torch.zeros(24, dtype=torch.int64)},  # classes without a point
            {"labels": torch.full((24,), 99)},
            {"ranks": torch.tensor([8, 8, 9])},
            {"ranks": torch.tensor([4.0, 4.0, 4.0])},
            {"means": torch.zeros(3, 7)},
            {"points": torch.full((24, 4), torch.nan)},
            {"counts": torch.tensor([8, 8])},
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(
        self, tmp_path: Path, change: dict[str, Tensor]
    ) -> None:
        path = tmp_path / "sketch.safetensors"
        save_sketch(path, replace(sketch_of(*blobs(0)), **change))
        with pytest.raises(CheckpointError, match="do not fit one another"):
            load_sketch(path)

    @pytest.mark.parametrize("name", ["counts", "points", "seed", "classes"])
    def test_missing_parts_are_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "sketch.safetensors"
        save_sketch(path, sketch_of(*blobs(0)))
        whole = load_checkpoint(path)
        tensors = {key: tensor for key, tensor in whole.tensors.items() if key != name}
        values = {key: value for key, value in whole.values.items() if key != name}
        save_checkpoint(path, Checkpoint(tensors, values))
        with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
            load_sketch(path)

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "sketch.safetensors"
        save_sketch(path, sketch_of(*blobs(0)))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            load_sketch(path)

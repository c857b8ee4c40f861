"""Feature spaces: pixels, principal components, a supernet's trunk, pretrained networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sketches import noise_task
from sklearn.decomposition import PCA

from nas.data import TaskShape, load_task
from nas.errors import ConfigurationError, DataError, UnknownNameError
from nas.search import find_method
from nas.spaces.darts.supernet import Supernet, SupernetConfig
from nas.transfer.otdd import (
    pixels,
    pretrained,
    principal_components,
    shapes,
    supernet_trunk,
)
from nas.transfer.otdd.embedding import to_common


class TestPixels:
    def test_are_the_image(self) -> None:
        images = noise_task(0, channels=3).images.gather(torch.arange(5))
        vectors = pixels(8, 3)(images)
        torch.testing.assert_close(vectors, images.flatten(1).float() / 255)

    def test_grey_becomes_colour_and_back(self) -> None:
        grey = noise_task(0).images.gather(torch.arange(5))
        colour = to_common(grey, 8, 3)
        assert colour.shape == (5, 3, 8, 8)
        back = to_common((colour * 255).round().to(torch.uint8), 8, 1)
        torch.testing.assert_close(back, grey.float() / 255, atol=1e-3, rtol=0)

    def test_two_channels_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"images of 2 channel\(s\)"):
            pixels()(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))

    def test_digests_tell_settings_apart(self) -> None:
        made = (pixels, shapes)
        digests = {
            f(side, channels).digest for f in made for side in (8, 16) for channels in (1, 3)
        }
        assert len(digests) == 8
        assert pixels(8, 3).digest == pixels().digest


class TestShapes:
    def test_agree_with_numpy(self) -> None:
        images = noise_task(0, channels=3).images.gather(torch.arange(5))
        raw = images.flatten(1).numpy() / 255
        mean, contrast = raw.mean(1, keepdims=True), raw.std(1, keepdims=True)
        shape = 2 * (raw - mean) / (contrast + 0.05) / np.sqrt(192)
        expected = np.concatenate([shape, mean, contrast], 1)
        np.testing.assert_allclose(shapes()(images).numpy(), expected, atol=1e-6)

    def test_see_the_same_shape_in_the_dark(self) -> None:
        bright = noise_task(0, channels=3).images.gather(torch.arange(5)) // 4 * 4
        first, second = shapes()(bright), shapes()(bright // 2)
        assert (first - second)[:, :-2].norm(dim=1).max() < 0.5
        torch.testing.assert_close(first[:, -2:], 2 * second[:, -2:])

    def test_an_image_of_one_colour_has_none(self) -> None:
        flat = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
        vectors = shapes()(flat)
        torch.testing.assert_close(vectors[:, :-2], torch.zeros(2, 192), atol=1e-5, rtol=0)
        torch.testing.assert_close(vectors[:, -2:], torch.tensor([[1.0, 0.0]] * 2))


class TestPrincipalComponents:
    def test_agree_with_scikit_learn(self, tmp_path: Path) -> None:
        task = load_task("digits", root=tmp_path)
        pool = torch.cat([task.splits.train, task.splits.val]).sort().values
        images = task.images.gather(pool)
        ours = principal_components([task], components=5, side=8, channels=1)(images).numpy()
        theirs = PCA(5).fit_transform(images.flatten(1).numpy() / 255)
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)

    def test_order_of_the_sets_does_not_matter(self) -> None:
        a, b = noise_task(0), noise_task(1)
        first, second = principal_components([a, b]), principal_components([b, a])
        images = a.images.gather(torch.arange(4))
        assert first.digest == second.digest
        assert torch.equal(first(images), second(images))
        assert principal_components([a]).digest != first.digest

    def test_needs_a_set(self) -> None:
        with pytest.raises(ConfigurationError, match="need a data set"):
            principal_components([])


class TestSupernetTrunk:
    SHAPE = TaskShape(channels=1, height=8, width=8, classes=3)

    def supernet(self, seed: int = 0) -> Supernet:
        return Supernet(self.SHAPE, SupernetConfig(channels=4, cells=3), seed=seed, backend="eager")

    def test_the_classifier_of_the_features_is_the_supernet(self) -> None:
        supernet = self.supernet()
        mixing = find_method("darts").mixing(supernet)
        images = noise_task(0).images.gather(torch.arange(6))
        features = supernet_trunk(supernet, mixing, (0.5,), (0.25,))(images)
        assert features.shape == (6, 4 * 16)
        assert supernet.training  # as it was
        supernet.eval()
        with torch.no_grad():
            scores = supernet((images.float() / 255 - 0.5) / 0.25, mixing)
        named = dict(supernet.named_weights())
        expected = features @ named["classifier.matrix"] + named["classifier.bias"]
        torch.testing.assert_close(scores, expected)

    def test_images_do_not_change_one_another(self) -> None:
        supernet = self.supernet()
        embedding = supernet_trunk(supernet, find_method("darts").mixing(supernet), (0.5,), (0.25,))
        before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
        images = noise_task(0, channels=3, side=16).images.gather(torch.arange(6))
        together = embedding(images)
        alone = torch.cat([embedding(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        for name, tensor in supernet.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_digest_is_of_weights_and_mixing(self) -> None:
        def digest(seed: int, temperature: float) -> str:
            supernet = self.supernet(seed)
            with torch.no_grad():
                supernet.alphas.mul_(temperature)
            mixing = find_method("darts").mixing(supernet)
            return supernet_trunk(supernet, mixing, (0.5,), (0.25,)).digest

        assert digest(0, 1) == digest(0, 1)
        assert len({digest(0, 1), digest(1, 1), digest(0, 100)}) == 3


class TestPretrained:
    FILE = "resnet18-f37072fd.pth"

    def test_weights_that_lie_there_are_used(self, tmp_path: Path) -> None:
        import torchvision

        network = torchvision.models.resnet18().eval()
        torch.save(network.state_dict(), tmp_path / self.FILE)
        images = noise_task(0, side=32).images.gather(torch.arange(2))
        features = pretrained("resnet18", tmp_path, download=False)(images)
        assert features.shape == (2, 512)
        batch = to_common(images, 128, 3)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            scores = network((batch - mean[:, None, None]) / std[:, None, None])
            torch.testing.assert_close(network.fc(features), scores, atol=1e-4, rtol=1e-4)

    def test_absent_weights_are_a_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"put torchvision's file at .*{self.FILE}") as caught:
            pretrained("resnet18", tmp_path, download=False)
        assert "pixels, pca, or a supernet's trunk" in str(caught.value)

    def test_a_damaged_file_is_a_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / self.FILE).write_bytes(b"no weights")
        with pytest.raises(DataError, match="pretrained weights of resnet18 cannot be had"):
            pretrained("resnet18", tmp_path)

    def test_unknown_network(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
            pretrained("resnet81", tmp_path)

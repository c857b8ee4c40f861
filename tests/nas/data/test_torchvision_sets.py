"""Public sets: the table, reading what lies on disk, and saying what is missing."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from nas.data import ImageTask, load_task
from nas.data.files import FileImages
from nas.data.torchvision_sets import PUBLIC
from nas.errors import DataError


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def _write_mnist(raw: Path, digits: ImageTask, train: int = 200, test: int = 60) -> np.ndarray:
    """Real digits in MNIST's files; the pixels that were written."""
    raw.mkdir(parents=True)
    pixels = digits.images.gather(torch.arange(train + test))[:, 0].numpy()
    labels = digits.labels[: train + test].numpy()
    for prefix, part in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        _write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels[part])
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels[part])
    return pixels


def test_mnist_files_are_read_and_the_official_test_split_kept(
    digits: ImageTask, tmp_path: Path
) -> None:
    pixels = _write_mnist(tmp_path / "MNIST" / "raw", digits)
    task = load_task("mnist", root=tmp_path, download=False)
    np.testing.assert_array_equal(task.images.gather(torch.arange(260))[:, 0], pixels)
    assert task.splits.test.tolist() == list(range(200, 260))
    assert len(task.splits.val) == 20  # a tenth of train
    assert not task.flip


def test_a_limit_shrinks_the_official_splits_alike(digits: ImageTask, tmp_path: Path) -> None:
    _write_mnist(tmp_path / "MNIST" / "raw", digits)
    task = load_task("mnist", root=tmp_path, download=False, limit=130)
    assert len(task.splits.test) == 30
    assert len(task.labels) == 130


def test_emnist_is_turned_upright(digits: ImageTask, tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = digits.images.gather(torch.arange(470))[:, 0].numpy()
    labels = np.arange(470) % 47
    for part in ("train", "test"):
        name = f"emnist-balanced-{part}"
        _write_idx(raw / f"{name}-images-idx3-ubyte", pixels.transpose(0, 2, 1))  # as published
        _write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    task = load_task("emnist", root=tmp_path, download=False)
    assert len(task.classes) == 47
    assert task.classes[46] == "t"
    np.testing.assert_array_equal(task.images.gather(torch.arange(470))[:, 0], pixels)


def test_fashion_mnist(shared_images: Path, tmp_path: Path) -> None:
    source = shared_images / "fashion-mnist"
    if not source.is_dir():
        pytest.skip("Fashion-MNIST is not at hand")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in source.glob("*.gz"):
        (raw / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
    task = load_task("fashion-mnist", root=tmp_path, download=False)
    assert task.shape == type(task.shape)(1, 28, 28, 10)
    sizes = [len(s) for s in (task.splits.train, task.splits.val, task.splits.test)]
    assert sizes == [54_000, 6_000, 10_000]
    assert task.labels[task.splits.val].bincount().tolist() == [600] * 10
    # published constants of the training images
    assert task.mean == pytest.approx((0.2860,), abs=1e-3)
    assert task.std == pytest.approx((0.3530,), abs=1e-3)
    assert task.classes[9] == "Ankle boot"


def test_flowers_stay_in_their_files_and_keep_all_three_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import Flowers102

    paths = []
    for number in range(1, 1 + 3 * 102):
        path = tmp_path / f"image_{number:05d}.png"
        Image.new("RGB", (12, 10), (number % 256, number // 256, 0)).save(path)
        paths.append(path)
    places = {"train": 0, "val": 102, "test": 204}

    def stand_in(self: Flowers102, root: Path, split: str, download: bool) -> None:
        self._image_files = paths[places[split] : places[split] + 102]
        self._labels = list(range(102))

    monkeypatch.setattr(Flowers102, "__init__", stand_in)
    task = load_task("flowers102", root=tmp_path)
    assert isinstance(task.images, FileImages)
    assert task.images.shape == (3, 224, 224)
    assert task.splits.val.tolist() == list(range(102, 204))
    assert task.splits.test.tolist() == list(range(204, 306))


def _colours(count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3], every image, row, column and channel different."""
    numbers = np.arange(count)[:, None, None, None]
    rows, columns = np.arange(32)[:, None, None], np.arange(32)[:, None]
    return ((numbers * 50 + rows * 7 + columns * 3 + np.arange(3) * 60) % 256).astype(np.uint8)


def _assert_pixels(task: ImageTask, expected: np.ndarray) -> None:
    pixels = task.images.gather(torch.arange(len(expected))).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels, expected)


def test_colour_sets_keep_rows_columns_and_channels_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR-10, SVHN and STL-10 store the axes in three orders; the checksums are waived."""
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    train, test = _colours(50), 255 - _colours(10)
    everything = np.concatenate([train, test])
    labels = {"train": np.arange(50) % 10, "test": np.arange(10)}
    images = {"train": train, "test": test}

    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    for number in range(6):
        part, of_part = ("test", slice(0, 10)) if number == 0 else (
            "train", slice(10 * number - 10, 10 * number)
        )  # fmt: skip
        batch = {
            "data": images[part][of_part].transpose(0, 3, 1, 2).reshape(10, -1),
            "labels": labels[part][of_part].tolist(),
        }
        name = f"data_batch_{number}" if number else "test_batch"
        (cifar / name).write_bytes(pickle.dumps(batch))
    names = [f"class {number}" for number in range(10)]
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))

    svhn, stl10 = tmp_path / "svhn", tmp_path / "stl10_binary"
    svhn.mkdir()
    stl10.mkdir()
    (stl10 / "class_names.txt").write_text("\n".join(names))
    for part in ("train", "test"):
        ten_is_nought = np.where(labels[part] == 0, 10, labels[part])
        content = {"X": images[part].transpose(1, 2, 3, 0), "y": ten_is_nought[:, None]}
        scipy.io.savemat(svhn / f"{part}_32x32.mat", content)
        large = images[part].repeat(3, axis=1).repeat(3, axis=2)  # [n, 96, 96, 3]
        large.transpose(0, 3, 2, 1).tofile(stl10 / f"{part}_X.bin")  # columns before rows
        (labels[part] + 1).astype(np.uint8).tofile(stl10 / f"{part}_y.bin")

    tasks = [load_task(n, root=tmp_path, download=False) for n in ("cifar10", "svhn", "stl10")]
    _assert_pixels(tasks[0], everything)
    _assert_pixels(tasks[1], everything)
    _assert_pixels(tasks[2], everything.repeat(3, axis=1).repeat(3, axis=2))
    for task in tasks:
        assert task.labels.tolist() == [*labels["train"], *labels["test"]]
        assert task.splits.test.tolist() == list(range(50, 60))
    assert [task.flip for task in tasks] == [True, False, True]
    assert tasks[0].classes == tuple(names)


def test_imagenet_streams_and_tells_its_two_cranes_apart(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    words = {"n02012849": ("crane",), "n02104029": ("kuvasz",), "n03126707": ("crane",)}
    for split, each in (("train", 4), ("val", 1)):
        for shade, wnid in enumerate(words):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for number in range(each):
                colour = (60 * shade, 50 * number, 100 if split == "val" else 0)
                Image.new("RGB", (40, 30), colour).save(folder / f"{number}.JPEG")
    torch.save((words, []), root / "meta.bin")
    task = load_task("imagenet", root=tmp_path, image_size=24)
    assert task.classes == ("crane (n02012849)", "kuvasz", "crane (n03126707)")
    assert isinstance(task.images, FileImages)
    assert task.images.shape == (3, 24, 24)
    assert task.splits.test.tolist() == [12, 13, 14]
    assert len(task.splits.val) == 3


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_missing_set_is_one_sentence_with_files_and_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_task(name, root=tmp_path, download=False)
    message = str(caught.value)
    assert message.startswith(f"data set '{name}' cannot be read (")
    assert PUBLIC[name].expects in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_without_a_network_the_message_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", unreachable)
    for name in ("cifar10", "mnist", "svhn", "stl10"):
        with pytest.raises(DataError, match=f"'{name}' cannot be read .*it needs .* in ") as caught:
            load_task(name, root=tmp_path)
        assert "\n" not in str(caught.value)


def test_damaged_files_are_a_data_error(digits: ImageTask, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    _write_mnist(raw, digits)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataError, match="'mnist' cannot be read"):
        load_task("mnist", root=tmp_path, download=False)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a batch")
    with pytest.raises(DataError, match=r"'cifar10' cannot be read .*cifar-10-batches-py/"):
        load_task("cifar10", root=tmp_path, download=False)

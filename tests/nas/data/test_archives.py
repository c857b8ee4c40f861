"""Archives as they are published: small ones, made by hand."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas.data.archives import ARCHIVES, read_archive
from nas.errors import DataError


def picture(mode: str, colour: int | tuple[int, ...], form: str) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(content, form)
    return content.getvalue()


def write_idx(folder: Path, pixels: np.ndarray, labels: list[int], magic: int = 2051) -> None:
    images, classes = (folder / file for file in ARCHIVES["mnist-test"].files)
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *pixels.shape))
    images.write_bytes(gzip.compress(header + pixels.tobytes()))
    header = (2049).to_bytes(4, "big") + len(labels).to_bytes(4, "big")
    classes.write_bytes(gzip.compress(header + bytes(labels)))


def test_idx(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path, pixels, [7, 3])
    raw = read_archive("mnist-test", tmp_path)
    assert isinstance(raw.images, torch.Tensor)
    assert raw.images.squeeze(1).numpy().tolist() == pixels.tolist()
    assert raw.classes == ("3", "7")
    assert raw.labels.tolist() == [1, 0]
    assert not raw.given


@pytest.mark.parametrize(("labels", "magic"), [([7], 2051), ([7, 3], 2050)])
def test_a_broken_idx_file(tmp_path: Path, labels: list[int], magic: int) -> None:
    write_idx(tmp_path, np.zeros((2, 3, 4), np.uint8), labels, magic)
    with pytest.raises(DataError, match=r"the set 'mnist-test' in .* cannot be read"):
        read_archive("mnist-test", tmp_path)


def test_class_folders_of_one_part(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / ARCHIVES["cifar10-test"].files[0], "w:xz") as archive:
        for name, colour in (
            ("test/dog/2.jpg", 200),
            ("train/dog/1.jpg", 9),
            ("test/cat/1.jpg", 50),
        ):
            content = picture("RGB", (colour,) * 3, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    raw = read_archive("cifar10-test", tmp_path)
    assert isinstance(raw.images, torch.Tensor)
    assert raw.images.shape == (2, 3, 3, 4)
    assert raw.images[:, 0, 0, 0].tolist() == [50, 200]
    assert [raw.classes[label] for label in raw.labels] == ["cat", "dog"]


def test_alphabets_of_two_archives(tmp_path: Path) -> None:
    for file, name, colour in zip(
        ARCHIVES["omniglot"].files,
        ("one/Greek/character01/1.png", "two/Latin/character07/2.png"),
        (0, 1),
        strict=True,
    ):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr(name, picture("1", colour, "PNG"))
    raw = read_archive("omniglot", tmp_path)
    assert isinstance(raw.images, torch.Tensor)
    assert raw.classes == ("Greek", "Latin")
    assert raw.images[:, 0, 0, 0].tolist() == [0, 255]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs eurosat_rgb64_500perclass.tar.xz in .*--data"):
        read_archive("eurosat", tmp_path)

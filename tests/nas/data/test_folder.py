"""Folders of image files: real digits written out, and real CIFAR-10 JPEGs where at hand."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas.data import ImageTask, TensorImages, catalog, files, load_task
from nas.data.files import FileImages, Header, default_size, fit, read_image, to_tensor
from nas.errors import DataError
from nas.observer import Observer

Write = Callable[..., Path]


def _load(folder: Path, **options: object) -> ImageTask:
    return load_task(f"folder:{folder}", root=folder.parent, **options)  # type: ignore[arg-type]


def test_a_plain_folder_is_read_and_cut(write_digits: Write, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "set", 20)
    (folder / ".hidden").mkdir()
    (folder / "digit-0" / "notes.txt").write_text("not an image")
    (folder / "digit-1" / ".thumb.png").write_text("hidden")
    task = _load(folder)
    assert task.classes == ("digit-0", "digit-1", "digit-2")
    assert task.shape == type(task.shape)(1, 8, 8, 3)
    assert not task.flip
    assert [len(s) for s in (task.splits.train, task.splits.val, task.splits.test)] == [39, 9, 12]
    assert "60 images in 3 classes" in task.description
    assert "2 other files passed over" in task.description
    first = np.asarray(Image.open(sorted((folder / "digit-0").glob("*.png"))[0]))
    np.testing.assert_array_equal(task.images.gather(torch.tensor([0]))[0, 0], first)


def test_content_and_split_decide_the_digest_and_not_the_place(
    write_digits: Write, tmp_path: Path
) -> None:
    one, other = write_digits(tmp_path / "a", 12), write_digits(tmp_path / "b", 12)
    assert _load(one).digest == _load(other).digest
    third = write_digits(tmp_path / "c", 12, skip=1)
    assert _load(one).digest != _load(third).digest


def test_folders_that_are_cut_keep_their_splits(write_digits: Write, tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_digits(root / "train", 20)
    write_digits(root / "val", 4, skip=20)
    write_digits(root / "test", 6, skip=24)
    splits = _load(root).splits
    assert (len(splits.train), len(splits.val), len(splits.test)) == (60, 12, 18)
    shutil.rmtree(root / "val")
    splits = _load(root).splits
    assert (len(splits.train), len(splits.val), len(splits.test)) == (54, 6, 18)
    shutil.rmtree(root / "test")
    splits = _load(root).splits
    assert (len(splits.train), len(splits.val), len(splits.test)) == (39, 9, 12)


def test_images_shared_by_given_splits_are_warned_of(write_digits: Write, tmp_path: Path) -> None:
    write_digits(tmp_path / "set" / "train", 20)
    write_digits(tmp_path / "set" / "test", 5, skip=18)  # two of each class are in train as well
    warnings: list[tuple[str, str]] = []

    class Listener(Observer):
        def on_warning(self, tag: str, message: str) -> None:
            warnings.append((tag, message))

    _load(tmp_path / "set", observer=Listener())
    assert [tag for tag, _ in warnings] == ["shared_images"]
    assert warnings[0][1].startswith("6 images")


def test_errors_say_what_is_wrong(write_digits: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        _load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds 0 class folder\(s\)"):
        _load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"holds 1 class folder\(s\).* at least two"):
        _load(write_digits(tmp_path / "one", 9, classes=1))
    with pytest.raises(DataError, match=r"class 'digit-0' has 2 different image"):
        _load(write_digits(tmp_path / "few", 2))
    hollow = write_digits(tmp_path / "hollow", 9)
    (hollow / "nothing").mkdir()
    with pytest.raises(DataError, match=r"class folder .*nothing' holds no images"):
        _load(hollow)


def test_split_folders_must_agree(write_digits: Write, tmp_path: Path) -> None:
    write_digits(tmp_path / "a" / "train", 9)
    write_digits(tmp_path / "a" / "test", 9, classes=2)
    with pytest.raises(DataError, match="differ in the classes digit-2"):
        _load(tmp_path / "a")
    write_digits(tmp_path / "b" / "test", 9)
    with pytest.raises(DataError, match="holds test: beside train there may be val and test"):
        _load(tmp_path / "b")
    write_digits(tmp_path / "c" / "train", 9)
    write_digits(tmp_path / "c" / "valid", 9)
    with pytest.raises(DataError, match="holds train, valid: beside train"):
        _load(tmp_path / "c")


def test_broken_images_are_counted_and_named(write_digits: Write, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "set", 9, side=64)
    broken = sorted(folder.glob("*/*.png"))[:5]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(b"no image at all")
    for path in broken[2:]:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        DataError, match=r"^5 image\(s\) do not decode: digit-0/\d+\.png .*, \.\.\.;"
    ):
        _load(folder)


def test_a_truncated_jpeg_is_found_when_it_is_decoded(write_digits: Write, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "set", 9, side=64)
    image = Image.open(next((folder / "digit-1").iterdir()))
    target = folder / "digit-1" / "cut.jpg"
    image.save(target)
    target.write_bytes(target.read_bytes()[:-100])  # its header is whole
    with pytest.raises(DataError, match=r"^1 image\(s\) do not decode: digit-1/cut.jpg"):
        _load(folder)


def test_large_sets_stay_in_their_files(
    write_digits: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_digits(tmp_path / "set", 12, side=100, mode="RGB")
    resident = _load(folder, image_size=32)
    assert isinstance(resident.images, TensorImages)
    monkeypatch.setattr(files, "RESIDENT_BYTES", 36 * 3 * 32 * 32 - 1)
    calls: list[tuple[str, int, int]] = []
    streamed = _load(folder, image_size=32, progress=lambda *call: calls.append(call))
    assert isinstance(streamed.images, FileImages)
    assert calls == [("checking images", 36, 36)]
    everything = torch.arange(36)
    assert torch.equal(streamed.images.gather(everything), resident.images.gather(everything))
    assert torch.equal(streamed.splits.test, resident.splits.test)
    assert streamed.mean == resident.mean


def _header(height: int, width: int) -> Header:
    return Header(width, height, True, b"")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(28, 28)] * 3, (28, 28)),
        ([(40, 64)] * 3, (40, 64)),
        ([(65, 65)] * 3, (64, 64)),
        ([(28, 28), (30, 28)], (24, 24)),
        ([(300, 400), (500, 333), (90, 120)], (224, 224)),
        ([(100, 90), (110, 300), (95, 96)], (88, 88)),  # median shortest side 95
        ([(5, 6), (6, 5)], (8, 8)),
    ],
)
def test_default_size(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert default_size(_header(*size) for size in sizes) == expected


def test_colour_is_found_and_grey_images_join_it(write_digits: Write, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "set", 9)
    Image.new("RGB", (8, 8), "red").save(folder / "digit-2" / "red.png")
    task = _load(folder)
    assert task.shape.channels == 3
    assert task.flip
    red = int(torch.nonzero(task.labels == 2)[-1])
    assert task.images.gather(torch.tensor([red]))[0, :, 0, 0].tolist() == [255, 0, 0]


def test_modes_become_eight_bits_upright_and_on_white(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(deep)
    assert np.asarray(read_image(deep, 1)).tolist() == [[0, 1, 128, 255]]

    clear = tmp_path / "clear.png"
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(clear)
    assert read_image(clear, 3).getpixel((0, 0)) == (255, 255, 255)

    bits = tmp_path / "bits.png"
    Image.new("1", (2, 2), 1).save(bits)
    assert np.asarray(read_image(bits, 1)).tolist() == [[255, 255], [255, 255]]

    lying = tmp_path / "lying.jpg"
    image = Image.new("L", (8, 16), 0)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    image.save(lying, exif=exif)
    assert read_image(lying, 1).size == (16, 8)
    assert (files.read_header(lying).width, files.read_header(lying).height) == (16, 8)


def test_fit_scales_the_shortest_side_and_crops_the_centre() -> None:
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert to_tensor(fit(Image.fromarray(wide), 10, 10)).unique().tolist() == [200]
    assert to_tensor(fit(Image.fromarray(wide), 20, 20)).shape == (1, 20, 20)


def test_real_jpegs_of_cifar10(shared_images: Path, tmp_path: Path) -> None:
    archive = shared_images / "cifar10_jpeg_60000.tar.xz"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 JPEGs are not at hand")
    wanted = ("airplane", "automobile")
    taken: Counter[str] = Counter()
    with tarfile.open(archive, "r|xz") as stream:  # read in order, stopped early
        for member in stream:
            parts = member.name.split("/")
            if member.isfile() and parts[1] in wanted and taken[parts[1]] < 100:
                stream.extract(member, tmp_path, filter="data")
                taken[parts[1]] += 1
            if all(taken[name] == 100 for name in wanted):
                break
    task = _load(tmp_path / "train")
    assert task.shape == type(task.shape)(3, 32, 32, 2)
    assert len(task.splits.test) == 40
    assert task.flip
    # what is widely used for CIFAR-10 is (0.49, 0.48, 0.45) and (0.25, 0.24, 0.26)
    assert task.mean == pytest.approx((0.49, 0.48, 0.45), abs=0.12)
    assert task.std == pytest.approx((0.25, 0.24, 0.26), abs=0.05)


def _write_photographs(folder: Path, *sizes: tuple[int, int]) -> Path:
    """``folder/<class>/<number>.png``, ten of each class, their (height, width) taking turns."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.parametrize("resident_bytes", [files.RESIDENT_BYTES, 0])
def test_files_give_their_images_as_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident_bytes: int
) -> None:
    monkeypatch.setattr(files, "RESIDENT_BYTES", resident_bytes)
    folder = _write_photographs(tmp_path / "set", (20, 31), (40, 17))
    whole, limited = _load(folder, image_size=12), _load(folder, image_size=12, limit=12)
    numbers = torch.tensor([7, 0, 11])
    paths = sorted(folder.glob("*/*.png"))
    for number, image in zip(numbers.tolist(), whole.images.originals(numbers), strict=True):
        pixels = np.asarray(Image.open(paths[number])).transpose(2, 0, 1)
        np.testing.assert_array_equal(image.numpy(), pixels)
    for task in (whole, limited):
        for image, scaled in zip(
            task.images.originals(numbers), task.images.gather(numbers), strict=True
        ):
            raw = Image.fromarray(image.permute(1, 2, 0).numpy())
            assert torch.equal(to_tensor(fit(raw, 12, 12)), scaled)


def test_examples_are_images_of_one_size_as_they_came(tmp_path: Path) -> None:
    folder = _write_photographs(tmp_path / "set", (20, 31), (40, 17))
    task = _load(folder, image_size=12)
    first, *_ = originals = task.images.originals(task.splits.val[:4])
    alike = [image for image in originals if image.shape == first.shape]
    assert torch.equal(task.examples, torch.stack(alike))


def test_examples_of_photographs_are_few_and_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write_photographs(tmp_path / "set", (40, 80))
    for limit, shape in (
        (10**6, (4, 3, 40, 80)),
        (2 * 3 * 40 * 80, (2, 3, 40, 80)),
        (3 * 40 * 80 - 1, (1, 3, 39, 79)),
        (3 * 10 * 20, (1, 3, 10, 20)),
    ):
        monkeypatch.setattr(catalog, "EXAMPLE_BYTES", limit)
        assert _load(folder, image_size=12).examples.shape == shape

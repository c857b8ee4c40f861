"""Small tasks of real images, in memory and in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from nas.data import ImageTask, load_task

SHARED_IMAGES = Path(__file__).parents[3].parent / "shared" / "data" / "images"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    return load_task("digits", root=tmp_path_factory.mktemp("unused"))


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    return load_task("animals", root=tmp_path_factory.mktemp("unused"))


@pytest.fixture
def write_digits(digits: ImageTask) -> Callable[..., Path]:
    """Writes real digits as ``folder/<class>/<number>.png``, ``each`` of every class."""

    def write(
        folder: Path, each: int, *, classes: int = 3, side: int = 8, mode: str = "L", skip: int = 0
    ) -> Path:
        for label in range(classes):
            target = folder / f"digit-{label}"
            target.mkdir(parents=True)
            numbers = torch.nonzero(digits.labels == label).flatten()[skip : skip + each]
            for number, pixels in zip(numbers.tolist(), digits.images.gather(numbers), strict=True):
                image = Image.fromarray(pixels[0].numpy()).convert(mode)
                image.resize((side, side)).save(target / f"{number:04d}.png")
        return folder

    return write


@pytest.fixture
def shared_images() -> Path:
    if not SHARED_IMAGES.is_dir():
        pytest.skip("the real image sets are not beside this checkout")
    return SHARED_IMAGES

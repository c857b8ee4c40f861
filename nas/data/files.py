"""Images in files: their headers, their decoding, and a store that decodes on demand.

Pillow is imported where a file is read: sets in memory do without (make gpu-check).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from nas.data.task import ImageStore, TensorImages
from nas.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

RESIDENT_BYTES = 2 * 2**30  # decoded sets up to this size live in memory
MAX_DEFAULT_SIZE = 224  # pixels a side, where the user names none
KEPT_SIZE = 64  # sets whose images all share one size up to this keep it

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)

_T = TypeVar("_T")
_R = TypeVar("_R")
_GREY_MODES = {"1", "L", "LA", "La", "I", "F"}


def map_images(
    function: Callable[[_T], _R],
    items: Sequence[_T],
    name_of: Callable[[_T], str],
    progress: Progress | None = None,
    what: str = "",
) -> list[_R]:
    """``function`` of every item, in threads (Pillow and hashlib release the interpreter's lock).

    Raises one DataError with the number and the first names of all that failed.
    """
    from PIL import UnidentifiedImageError

    def attempt(item: _T) -> tuple[_R | None, str | None]:
        try:
            return function(item), None
        except UnidentifiedImageError:  # whose text names an object in memory
            return None, f"{name_of(item)} (no image that Pillow knows)"
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            return None, f"{name_of(item)} ({error})"

    results: list[_R] = []
    failures: list[str] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (result, failure) in enumerate(pool.map(attempt, items), 1):
            if failure is None:
                results.append(result)  # type: ignore[arg-type]
            else:
                failures.append(failure)
            if progress is not None and (done % 64 == 0 or done == len(items)):
                progress(what, done, len(items))
    if failures:
        listed = ", ".join(failures[:3]) + (", ..." if len(failures) > 3 else "")
        raise DataError(f"{len(failures)} image(s) do not decode: {listed}; mend or remove them")
    return results


def shown(path: Path) -> str:
    """Enough of a path to find the file: its class folder and name."""
    return f"{path.parent.name}/{path.name}"


@dataclass(frozen=True)
class Header:
    """What is known of an image file before it is decoded."""

    width: int  # pixels, as shown: after the rotation a camera asks for
    height: int
    grey: bool
    fingerprint: bytes  # SHA-256 of the file


def read_header(path: Path) -> Header:
    """Header of one file, its whole content hashed and its structure verified by Pillow."""
    from PIL import Image

    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        # asked for in vain, getexif() would decode a PNG to its end
        orientation = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
        if orientation >= 5:  # 5..8 lie on their side
            width, height = height, width
        grey = image.mode in _GREY_MODES or image.mode.startswith("I;16")
        image.verify()
    return Header(width, height, grey, hashlib.sha256(content).digest())


def read_image(path: Path, channels: int) -> Image.Image:
    """A file decoded to 8 bits, upright, on white where it is transparent; mode L or RGB."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled, antialiased, until it covers (height, width), then cropped at the centre."""
    from PIL import Image, ImageOps

    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)


def stretch(
    image: Image.Image, box: tuple[int, int, int, int], height: int, width: int
) -> Image.Image:
    """The part of ``image`` in ``box`` (left, top, right, bottom), scaled to (height, width)."""
    from PIL import Image

    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [C, H, W] of an image of mode L or RGB."""
    array = np.array(image)  # [H, W] or [H, W, 3]; a copy, as torch needs writable memory
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


class FileImages:
    """Images decoded from their files whenever they are asked for.

    ``shape`` is (channels, height, width): the shortest side is scaled to it, the centre cropped.
    """

    def __init__(
        self, paths: Sequence[Path], shape: tuple[int, int, int], fingerprints: Sequence[bytes]
    ) -> None:
        self.paths = tuple(paths)
        self._shape = shape
        self._fingerprints = fingerprints

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def image(self, index: int) -> Image.Image:
        """One image at its full size, mode L or RGB. Raises DataError if it does not decode."""
        path = self.paths[index]
        return map_one(lambda: read_image(path, self._shape[0]), path)

    def gather(self, indices: Tensor, progress: Progress | None = None) -> Tensor:
        channels, height, width = self._shape

        def decode(path: Path) -> Tensor:
            return to_tensor(fit(read_image(path, channels), height, width))

        images = map_images(decode, self._chosen(indices), shown, progress, "decoding images")
        return torch.stack(images) if images else torch.empty(0, *self._shape, dtype=torch.uint8)

    def originals(self, indices: Tensor) -> list[Tensor]:
        channels = self._shape[0]
        chosen = self._chosen(indices)
        return map_images(lambda path: to_tensor(read_image(path, channels)), chosen, shown)

    def fingerprints(self) -> Sequence[bytes]:
        return self._fingerprints

    def origins(self) -> Sequence[bytes]:
        return self._fingerprints

    def subset(self, indices: Tensor) -> FileImages:
        fingerprints = [self._fingerprints[index] for index in indices.tolist()]
        return FileImages(self._chosen(indices), self._shape, fingerprints)

    def _chosen(self, indices: Tensor) -> list[Path]:
        return [self.paths[index] for index in indices.tolist()]


def map_one(read: Callable[[], _R], path: Path) -> _R:
    """``read()``, with whatever it raises turned into a DataError that names the file."""
    try:
        return read()
    except Exception as error:  # see map_images
        raise DataError(f"the image {shown(path)} does not decode: {error}") from error


def default_size(headers: Iterable[Header]) -> tuple[int, int]:
    """(height, width) where the user names none.

    The common size if all images share one of at most 64 pixels a side; else a square of the
    median shortest side, rounded down to a multiple of 8 and kept between 8 and 224 pixels.
    """
    sizes = [(header.height, header.width) for header in headers]
    if len(set(sizes)) == 1 and max(sizes[0]) <= KEPT_SIZE:
        return sizes[0]
    shortest = sorted(min(size) for size in sizes)
    side = shortest[len(shortest) // 2] // 8 * 8
    side = max(8, min(side, MAX_DEFAULT_SIZE))
    return side, side


def open_files(
    paths: Sequence[Path],
    *,
    image_size: int | None,
    largest: int | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> ImageStore:
    """A store of image files, every one of them read once and checked.

    The images have ``image_size``, or else their own size unless that is above ``largest``.
    One channel if all files are grey, else three. In memory, fully decoded, up to 2 GiB, unless
    ``stream`` asks for files; larger sets stay in their files, with only headers and structure
    checked here. Raises DataError with the number and the first names of broken files.
    """
    headers = map_images(read_header, paths, shown, progress, "checking images")
    channels = 1 if all(header.grey for header in headers) else 3
    height, width = (image_size, image_size) if image_size else default_size(headers)
    if image_size is None and largest is not None and min(height, width) > largest:
        height, width = largest, largest
    store = FileImages(paths, (channels, height, width), [h.fingerprint for h in headers])
    if stream or len(paths) * channels * height * width > RESIDENT_BYTES:
        return store
    return TensorImages(store.gather(torch.arange(len(paths)), progress), store)

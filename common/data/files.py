"""A user's picture files: search of folders, and decoding ahead by threads, which reports damaged files.

Shapes: H height, W width.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageOps

from common.data.transforms import Transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are decoded, whatever the suffix: PIL would start other programs for some others."""


@dataclass(frozen=True)
class Picture:
    """name: path or number.  pixels: uint8 [H,W,3], or None with the reason in ``error``."""

    name: str
    pixels: np.ndarray | None
    error: str | None = None


def files_below(folder: Path, links: bool = False) -> Iterator[Path]:
    """Every file in a folder, at any depth: the files directly in a folder first, in the order of their names.

    links: whether links to folders are followed.
    ValueError: an unreadable folder, which ``os.walk`` and ``Path.rglob`` would silently skip.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror}); make it readable") from error

    for inner, folders, names in os.walk(folder, onerror=refuse, followlinks=links):
        folders.sort()
        yield from (Path(inner, name) for name in sorted(names))


def find_pictures(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The picture files among ``paths`` and, by suffix, in the folders among them, at any depth, sorted.

    A file in ``paths`` is taken whatever its suffix. Links to folders are not followed.
    ValueError: a missing path, a folder without a picture, or an unreadable folder at any depth.
    """
    for path in map(Path, paths):
        if path.is_file():
            yield path
            continue
        if not path.is_dir():
            raise ValueError(f"no picture and no folder at {path.absolute()}")
        empty = True
        for file in files_below(path):
            if file.name.lower().endswith(SUFFIXES):
                empty = False
                yield file
        if empty:
            raise ValueError(f"{path.absolute()} holds no picture ({', '.join(SUFFIXES)})")


def decode(source: Path | Image.Image, name: str, transform: Transform) -> Picture:
    """One picture, turned by its EXIF orientation and transformed."""
    try:
        if isinstance(source, Image.Image):
            return Picture(name, transform(ImageOps.exif_transpose(source), Random(0)))
        with Image.open(source, formats=_FORMATS) as image:
            return Picture(name, transform(ImageOps.exif_transpose(image), Random(0)))
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        return Picture(name, None, f"{type(error).__name__}: {error}")


def read_ahead(
    sources: Iterable[Path | Image.Image], transform: Transform, workers: int, ahead: int
) -> Iterator[Picture]:
    """The pictures in order, decoded by ``workers`` threads; at most ``ahead`` of them wait in memory."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Picture]] = deque()
    try:
        for number, source in enumerate(sources):
            name = str(source) if isinstance(source, Path) else str(getattr(source, "filename", "") or number)
            waiting.append(pool.submit(decode, source, name, transform))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

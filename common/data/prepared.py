"""From a picture's file to the pixels that a model sees, by numpy and Pillow alone.

Training, evaluation and exported folders (``common.deploy.runtime``) prepare pictures by these functions. They need no
torch: a worker process would need as long to import torchvision as torch. They equal torchvision's results.
Shapes: S image size, H height, W width.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are decoded, whatever the suffix: PIL would start other programs for some others."""
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
            ".pnm")  # fmt: skip
"""The suffixes of files that are taken from a folder."""

_SYSTEM = re.compile(
    r"(?:^|/)(?:\.(?!\.?(?:/|$))|(?:__macosx|@eadir|\$recycle\.bin|system volume information|lost\+found|thumbs\.db"
    r"|desktop\.ini)(?:/|$))",
    re.IGNORECASE,
)
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of an EXIF orientation upright. (Pillow's own function also writes all other tags anew, and
fails where one of them is damaged.)"""
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LONG = 20  # aspect ratio beyond which the evaluation crop is resized alone


def is_system_file(name: str) -> bool:
    """Whether a relative path is a file manager's or a tool's own: hidden (``._x.jpg``), or a folder such as @eaDir."""
    return _SYSTEM.search(name) is not None


SPECIAL = "pipe or device"
"""The kind of what is neither a file nor a folder: nothing might ever come out of it."""


def is_special(path: Path, is_file: bool) -> bool:
    """Whether a path that is no folder is SPECIAL. A link to nothing is not, so that its error names it."""
    return not is_file and path.exists()


def kind_of(path: Path) -> str:
    """The kind of a file in words: its suffix."""
    return path.suffix.lower() or "without a suffix"


def left_out_line(kinds: Counter[str]) -> str:
    """How many files of each kind were left out, such as "2 files left out: 1 .avif, 1 .heic"."""
    total = kinds.total()
    parts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{total:,} file{'s' if total > 1 else ''} left out: {parts}"


def open_upright(source: str | Path | BinaryIO | Image.Image, formats: Sequence[str] = FILE_FORMATS) -> Image.Image:
    """The first frame of a file, stream or PIL image, upright by its EXIF orientation, in 8-bit RGB.

    Pixels of 16 bits are scaled to 8. An alpha channel is dropped, as open_clip drops it.
    ValueError: it is damaged, too large, of another format, or has 32-bit pixels, whose white is unknown.
    """
    _accept_large_pictures()
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(source, formats=formats) as image:
            return _upright_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(formats)}") from error
    except _UnknownWhite:
        raise
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error


@cache
def _accept_large_pictures() -> None:
    """Let Pillow open without a warning what it does not refuse as too large.

    It goes last among the filters, so that a user's own come first. It stays, because threads share the filters.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning, append=True)


class _UnknownWhite(ValueError):
    """A picture's pixels have no known scale."""


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        kind = "whole numbers" if image.mode == "I" else "floating-point numbers"
        raise _UnknownWhite(f"its pixels are 32-bit {kind}; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        turned = _upright(image)
        return Image.fromarray((np.asarray(turned).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return _upright(to_rgb(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION))
    except Exception:  # a damaged EXIF block: the picture itself is sound
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, itself where it is that already."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, and Pillow warns of the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def resized(image: Image.Image, size: int, interpolation: str, resize_mode: str, fill_color: int) -> np.ndarray:
    """The picture as a model sees it before normalisation: uint8 [S,S,3].

    size, interpolation, resize_mode, fill_color: as in ``common.preprocess.Preprocess``.
    """
    image, resampling = to_rgb(image), _RESAMPLING[interpolation]
    if resize_mode == "squash":
        return np.asarray(image.resize((size, size), resampling))
    if resize_mode == "longest":
        ratio = max(image.size) / size
        small = image.resize(tuple(max(1, round(side / ratio)) for side in image.size), resampling)
        canvas = Image.new("RGB", (size, size), (fill_color,) * 3)
        canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
        return np.asarray(canvas)
    width, height = (int(size * side / min(image.size)) for side in image.size)
    if max(width, height) > _LONG * size:  # the whole picture would need gigabytes: resize its centre alone
        side, (x, y) = min(image.size), (length / 2 for length in image.size)
        box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
        return np.asarray(image.resize((size, size), resampling, box=box))
    image = image.resize((width, height), resampling)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))

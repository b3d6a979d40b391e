"""Open a picture as every part of the suite does: first frame, upright by its EXIF orientation, in 8-bit RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.data.account import Unusable

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
FILE_FORMATS = (*SHARD_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""The formats that are decoded, whatever the suffix: PIL would start other programs for some others."""
ORIENTATION = "turned by EXIF"
"""What result files say about the orientation of pictures."""
_EXIF_ORIENTATION = 0x0112


def open_picture(source: Path | BinaryIO | Image.Image, formats: Sequence[str] = FILE_FORMATS) -> Image.Image:
    """The picture of a file or stream, or a PIL image, upright and in RGB.

    Pixels of 16 bits are scaled to 8. An alpha channel is dropped, as open_clip drops it.
    Unusable: it is damaged, too large, of another format, or has 32-bit pixels, whose white is unknown.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(source, formats=formats) as image:
            return _upright_rgb(image)
    except Unusable:
        raise
    except UnidentifiedImageError as error:
        raise Unusable("unusable picture", f"it is none of {', '.join(formats)}") from error
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise Unusable("unusable picture", f"{type(error).__name__}: {error}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format == "PNG"):
        kind = "whole numbers" if image.mode == "I" else "floating-point numbers"
        raise Unusable("unusable picture", f"its pixels are 32-bit {kind}; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        turned = _upright(image)
        return Image.fromarray((np.asarray(turned).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return _upright(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block: the picture itself is sound
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image

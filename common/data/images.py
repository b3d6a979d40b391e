"""Open a picture as every part of the suite does: first frame, upright by its EXIF orientation, in 8-bit RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from common.data.account import Unusable
from common.data.prepared import FILE_FORMATS, open_upright

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = "turned by EXIF"
"""What result files say about the orientation of pictures."""


def open_picture(source: Path | BinaryIO | Image.Image, formats: Sequence[str] = FILE_FORMATS) -> Image.Image:
    """``open_upright`` of a sample. Unusable: where that is a ValueError."""
    try:
        return open_upright(source, formats)
    except ValueError as error:
        raise Unusable("unusable picture", str(error)) from error

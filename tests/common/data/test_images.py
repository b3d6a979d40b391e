"""Pictures of every kind look the same to shards, evaluation and classify: upright, 8 bits, first frame."""

import io
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from common.data.account import Unusable
from common.data.files import decode
from common.data.images import open_picture
from common.data.pictures import PictureSet
from common.data.reader import Decoder
from common.data.transforms import eval_transform
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer

RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_an_upside_down_picture_stands_upright_everywhere(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = Image.fromarray(RAMP).convert("RGB")
    content = encoded(upright.rotate(180), exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    transform = eval_transform(Preprocess(16))
    shard = Decoder(transform, Preprocess(16), Tokenizer())({"__key__": "a", "png": content, "txt": b"a"}, None)[
        "image"
    ]
    evaluated = transform(PictureSet([str(tmp_path / "a.png")], tmp_path).picture(0), None)
    classified = decode("a", tmp_path / "a.png", transform).pixels
    for pixels in (shard, evaluated, classified):
        assert np.array_equal(pixels, np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(open_picture(io.BytesIO(encoded(deep, kind))))[..., 0], RAMP)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "floating-point"), (np.int32, "whole")])
def test_pixels_without_a_white_are_refused_by_name(dtype, name):
    with pytest.raises(Unusable, match=f"32-bit {name} numbers; save it with 8 or 16 bits"):
        open_picture(io.BytesIO(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF")))


def test_a_damaged_exif_block_does_not_cost_the_picture():
    content = encoded(Image.fromarray(RAMP), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert np.array_equal(np.asarray(open_picture(io.BytesIO(content)))[..., 0], RAMP)


def test_a_damaged_tag_beside_the_orientation_costs_neither():
    """The unit of resolution is a LONG beyond what its SHORT holds, which Pillow reads and cannot write again."""
    entries = struct.pack(">HHIHxx", 0x0112, 3, 1, 3) + struct.pack(">HHII", 296, 4, 1, 65536)
    block = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    turned = Image.fromarray(RAMP).transpose(Image.Transpose.ROTATE_180)
    assert np.array_equal(np.asarray(open_picture(io.BytesIO(encoded(turned, exif=block))))[..., 0], RAMP)


def test_a_picture_over_the_limit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "large.png").write_bytes(encoded(Image.new("L", (30, 30))))
    with pytest.raises(ValueError, match=r"large\.png is no picture that can be read \(DecompressionBombError"):
        PictureSet([str(tmp_path / "large.png")], tmp_path).picture(0)


def test_errors_hold_no_addresses():
    with pytest.raises(Unusable, match=r"^it is none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM$"):
        open_picture(io.BytesIO(b"<html>404</html>"))


def test_a_long_picture_shows_its_centre():
    long = np.zeros((2, 4000, 3), np.uint8)
    long[:, 1990:2010] = 200
    pixels = eval_transform(Preprocess(32))(Image.fromarray(long), None)
    assert pixels.shape == (32, 32, 3) and pixels.min() == pixels.max() == 200


def test_a_grey_map_of_16_bits_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 0, 255, 255]))
    assert np.asarray(open_picture(tmp_path / "a.pgm")).tolist() == [[[0] * 3, [255] * 3]]


def test_a_palettes_transparency_is_dropped_without_a_warning():
    picture = Image.fromarray(RAMP).quantize(8)
    content = encoded(picture, transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(open_picture(io.BytesIO(content)), picture.convert("RGB"))


LARGE = """
import sys
from PIL import Image
from common.data.prepared import open_upright
Image.MAX_IMAGE_PIXELS = 200  # a picture of 16 by 16 is above it, and below the double, which is refused
print(open_upright(sys.argv[1]).size)
"""


def test_a_large_picture_is_opened_without_a_warning(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "large.png")
    run = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "large.png")], capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("(16, 16)\n", "")

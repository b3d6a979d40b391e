"""Folders of pictures: all of them in order, upright, the damaged ones told apart, and not too many at a time."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.account import Account
from common.data.classification import own_set
from common.data.files import decode, find_pictures, is_system_file, read_ahead
from common.data.prepared import left_out_line
from common.data.smoke import jpeg
from common.data.transforms import eval_transform
from common.data.write_shards import read_folder
from common.preprocess import Preprocess

TRANSFORM = eval_transform(Preprocess(8))


@pytest.fixture
def folder(tmp_path):
    """Pictures at several depths among other files."""
    for name in ("b.jpg", "a.JPEG", "sub/c.png", "sub/deep/d.webp", "notes.txt", "sub/e.json"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".webp"):
            Image.new("RGB", (9, 7), "red").save(file)
        else:
            file.write_bytes(jpeg(0))
    return tmp_path / "pictures"


def test_pictures_are_found_at_any_depth_in_order(folder):
    found = [path.relative_to(folder).as_posix() for path in find_pictures([folder])]
    assert found == ["a.JPEG", "b.jpg", "sub/c.png", "sub/deep/d.webp"]
    assert list(find_pictures([folder / "notes.txt", folder / "b.jpg"])) == [folder / "notes.txt", folder / "b.jpg"]


def test_files_of_other_kinds_are_counted_by_their_suffix(folder):
    for name in ("a.heic", "b.AVIF", "c.avif", ".hidden.heic"):
        (folder / name).touch()
    account = Account()
    list(find_pictures([folder], account))
    assert left_out_line(account.kinds) == "5 files left out: 2 .avif, 1 .heic, 1 .json, 1 .txt"


def test_a_pipe_in_a_folder_is_no_picture(folder):
    os.mkfifo(folder / "pipe.jpg")
    account = Account()
    assert folder / "pipe.jpg" not in find_pictures([folder], account)
    assert account.kinds["pipe or device"] == 1


def test_a_link_to_nothing_is_a_picture_whose_error_names_it(folder):
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    assert folder / "gone.jpg" in find_pictures([folder])


@pytest.mark.parametrize("suffix", [".jpe", ".pbm", ".pnm"])
def test_rarer_suffixes_are_pictures(tmp_path, suffix):
    Image.new("L", (9, 9)).save(tmp_path / f"a{suffix}")
    (found,) = find_pictures([tmp_path])
    assert decode("a", found, TRANSFORM).error is None


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("._a.jpg", True),
        ("x/.git/a.jpg", True),
        ("__MACOSX/a.jpg", True),
        ("x/Thumbs.db", True),
        ("./a.jpg", False),
        ("../x/a.jpg", False),
        ("a.b.jpg", False),
        ("lost+found things/a.jpg", False),
    ],
)
def test_files_of_a_system(name, system):
    assert is_system_file(name) == system


def test_what_is_not_there_is_named(folder):
    (folder / "empty").mkdir()
    for wrong, message in ((folder / "nowhere", "no picture and no folder at"), (folder / "empty", "holds no picture")):
        with pytest.raises(ValueError, match=message):
            list(find_pictures([wrong]))


@pytest.mark.parametrize("read", [lambda folder: list(find_pictures([folder])), read_folder, own_set])
def test_a_folder_that_cannot_be_read_is_not_passed_over(folder, monkeypatch, read):
    scandir, hidden = os.scandir, folder / "sub" / "deep"

    def refused(path):  # permissions would not stop root
        if Path(path) == hidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=f"the folder {hidden} cannot be read"):
        read(folder)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_orientation_says(tmp_path, orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # How a camera that was turned stores the scene, by the EXIF standard's own table.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    found = decode("turned", tmp_path / "turned.png", eval_transform(Preprocess(16)))
    assert found.error is None and np.array_equal(found.pixels, upright)


def test_damaged_pictures_say_what_is_wrong(tmp_path):
    whole = jpeg(0, 64)
    cases = {"cut.jpg": whole[: len(whole) // 2], "text.jpg": b"no picture", "empty.png": b"", "whole.jpg": whole}
    cases["script.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # PIL would start Ghostscript
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    found = {name: decode(name, tmp_path / name, TRANSFORM) for name in cases}
    assert found["whole.jpg"].error is None and found["whole.jpg"].pixels.shape == (8, 8, 3)
    for name in cases.keys() - {"whole.jpg"}:
        assert found[name].pixels is None and found[name].error, name
    assert found["text.jpg"].error.startswith("it is none of JPEG, PNG") and "truncated" in found["cut.jpg"].error


def test_pictures_in_memory_and_their_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    sources = [Image.new("L", (9, 9)), Image.open(tmp_path / "a.jpg"), tmp_path / "a.jpg"]
    found = list(read_ahead(sources, TRANSFORM, workers=2, ahead=2))
    assert [picture.name for picture in found] == ["0", str(tmp_path / "a.jpg"), str(tmp_path / "a.jpg")]
    assert np.array_equal(found[1].pixels, found[2].pixels) and all(p.pixels.shape == (8, 8, 3) for p in found)


def test_no_more_are_decoded_than_may_wait():
    begun, lock = [], threading.Lock()

    def transform(image, rng):
        with lock:
            begun.append(image.width)
        return np.zeros((1, 1, 3), np.uint8)

    sources = (Image.new("L", (width, 1)) for width in range(1, 101))
    stream = read_ahead(sources, transform, workers=3, ahead=5)
    for taken in range(1, 21):
        assert next(stream).error is None
        assert len(begun) <= taken + 5
    stream.close()
    assert len(begun) <= 26, "what nobody takes is not decoded"

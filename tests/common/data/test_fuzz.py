"""Damaged and odd inputs by the hundred: what goes in is delivered, rejected with a reason, or refused."""

import csv
import io
import tarfile
from contextlib import suppress
from random import Random

import pytest
from PIL import Image

from common.data.account import Account, Unusable
from common.data.images import open_picture
from common.data.smoke import jpeg
from common.data.tables import read_table
from common.data.tar import Shard, count_headers, read_shard

ROUNDS = 120


def damaged(content: bytes, rng: Random) -> bytes:
    """Bytes that a disk or a network made of others: cut, flipped, with a part lost or doubled, or with a tail."""
    content = bytearray(content)
    place, length = rng.randrange(len(content)), rng.choice((1, 2, 64, 512, 700))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        content[place : place + length] = rng.randbytes(length)
    elif kind == 2:
        del content[place : place + length]
    elif kind == 3:
        content[place:place] = content[place : place + length]
    else:
        content += rng.randbytes(length)
    return bytes(content)


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars(tmp_path, kind):
    path, rng = tmp_path / "0.tar", Random(kind)
    with tarfile.open(path, kind) as file:
        for n in range(6):
            for name, content in ((f"{n}.jpg", jpeg(n)), (f"{n}.txt", b"a caption")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                file.addfile(header, io.BytesIO(content))
    whole = path.read_bytes()
    for number in range(ROUNDS):
        path.write_bytes(damaged(whole, rng))
        account = Account()
        keys = [sample["__key__"] for sample in read_shard(Shard(str(path), 6), account)]
        assert len(keys) + account.bad >= 6 and len(set(keys)) == len(keys), f"round {number}: a sample was lost"
        assert 0 <= count_headers(str(path)) <= 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures(kind):
    whole, rng = io.BytesIO(), Random(kind)
    Image.open(io.BytesIO(jpeg(0, 24))).save(whole, kind)
    for _ in range(ROUNDS):
        content = damaged(whole.getvalue(), rng)
        image = None
        with suppress(Unusable):
            image = open_picture(io.BytesIO(content))
        assert image is None or image.mode == "RGB"


LETTERS = ["a", "Z", "7", "é", "你", " ", '"', "'", ",", "\t", ";", "\\", "\u2028", "\x00", "&nbsp;", "\ufeff"]


@pytest.mark.parametrize("end", ["csv", "tsv"])
def test_tables_written_by_hand(tmp_path, end):
    """Where a table is accepted, no letter of it is lost, and no two lines became one row."""
    file, rng = tmp_path / f"a.{end}", Random(end)
    separator = "," if end == "csv" else "\t"
    for _ in range(3 * ROUNDS):
        cells = [["".join(rng.choices(LETTERS, k=rng.randrange(5))) for _ in "ab"] for _ in range(4)]
        text = f"path{separator}caption\n" + "".join(f"{separator.join(row)}\n" for row in cells)
        encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
        file.write_text(text, encoding=encoding, errors="replace", newline="")
        rows = None
        with suppress(ValueError):
            rows = list(read_table(file, ("path", "caption")))
        if rows is None:
            continue
        kept = "".join(cell for row in rows for cell in row.cells.values())
        assert sorted(filter(str.isalnum, kept)) == sorted(filter(str.isalnum, text.split("\n", 1)[1]))
        assert end == "csv" or len(rows) <= 4


def test_tables_written_by_a_program_come_back_whole(tmp_path):
    file, rng = tmp_path / "a.csv", Random(0)
    for _ in range(ROUNDS):
        cells = [["".join(rng.choices([*LETTERS, "\n"], k=rng.randrange(1, 6))) + "x" for _ in "ab"] for _ in range(4)]
        with open(file, "w", newline="", encoding="utf-8") as lines:
            csv.writer(lines).writerows([("path", "caption"), *cells])
        rows = [[row.cells["path"], row.cells["caption"]] for row in read_table(file, ("path", "caption"))]
        assert rows == [[cell.strip() for cell in row] for row in cells]

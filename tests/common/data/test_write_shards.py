"""Packing: what goes in comes out once, also after a kill; what cannot go in is named, never dropped."""

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import sys

import pyarrow
import pytest
from pyarrow import parquet

from common.data import write_shards
from common.data.account import Account
from common.data.packing import RECORDS, read_manifest, write_tar
from common.data.smoke import jpeg
from common.data.tar import Shard, read_shard


@pytest.fixture
def pictures(tmp_path):
    """A folder of 13 pictures, some in a subfolder, each with its caption beside it."""
    folder = tmp_path / "pictures"
    (folder / "more.jpg files").mkdir(parents=True)
    for number in range(13):
        file = folder / ("more.jpg files" if number % 3 == 0 else "") / f"img.{number:02d}.jpg"
        file.write_bytes(jpeg(number))
        file.with_suffix(".txt").write_text(f"picture {number} é\n", "utf-8")
    return folder


def run(*arguments):
    return write_shards.main([*map(str, arguments), "--workers", "2"])


def samples(folder):
    """All samples of a folder's shards in order, undecoded; the manifest's counts and hashes must hold."""
    manifest = read_manifest(folder)
    assert sorted(manifest["shards"]) == sorted(path.name for path in folder.glob("*.tar"))
    found = []
    for name, entry in sorted(manifest["shards"].items()):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
        damage = Account(0.0)
        found += list(read_shard(Shard(str(folder / name), entry["samples"]), damage))
        assert damage.bad == 0
    assert manifest["samples"] == len(found)
    return found


def table(file, rows, columns=("path", "caption", "label")):
    with open(file, "w", newline="") as lines:
        csv.writer(lines, delimiter="," if file.suffix == ".csv" else "\t").writerows([columns, *rows])
    return file


def test_a_folder_with_captions_beside_the_pictures(tmp_path, pictures, capsys):
    out = tmp_path / "out"
    assert run("folder", pictures, out, "--samples-per-shard", 5, "--source", "ours", "--variant", "v2") == 0
    found = samples(out)
    assert len({sample["__key__"] for sample in found}) == 13
    for sample in found:
        number = int(json.loads(sample["json"])["path"][-6:-4])
        assert sample["jpg"] == jpeg(number) and sample["txt"].decode() == f"picture {number} é"
    manifest = read_manifest(out)
    assert [entry["samples"] for entry in manifest["shards"].values()] == [5, 5, 3]
    assert (manifest["source"], manifest["variant"], manifest["rejected"]) == ("ours", "v2", 0)
    assert "13 samples in 3 shards, 00000.tar to 00002.tar" in capsys.readouterr().out
    assert not (out / RECORDS).exists()


def test_the_order_is_mixed_and_always_the_same(tmp_path, pictures):
    for name in ("a", "b"):
        run("folder", pictures, tmp_path / name)
    keys = [sample["__key__"] for sample in samples(tmp_path / "a")]
    assert keys != sorted(keys)
    assert read_manifest(tmp_path / "a")["shards"] == read_manifest(tmp_path / "b")["shards"]


def test_a_folder_with_a_captions_table_counts_the_pictures_it_does_not_name(tmp_path, pictures, capsys):
    named = [path.relative_to(pictures) for path in sorted(pictures.rglob("*.jpg")) if path.is_file()][:12]
    captions = table(tmp_path / "captions.tsv", [(path, "a caption") for path in named], ("path", "caption"))
    assert run("folder", pictures, tmp_path / "out", "--captions", captions) == 1
    assert "1 samples cannot be used" in capsys.readouterr().err
    assert run("folder", pictures, tmp_path / "out", "--captions", captions, "--max-rejected", 0.1) == 0
    assert {sample["txt"] for sample in samples(tmp_path / "out")} == {b"a caption"}
    assert "empty caption" in (tmp_path / "out" / "rejected.tsv").read_text()


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_tables(tmp_path, pictures, kind):
    paths = sorted(path for path in pictures.rglob("*.jpg") if path.is_file())
    words = "says {}, indeed" if kind == ".tsv" else 'says "{}",\nindeed'
    rows = [(str(path.relative_to(pictures)), words.format(path.stem), n) for n, path in enumerate(paths)]
    file = tmp_path / f"pairs{kind}"
    if kind == ".parquet":
        columns = dict(zip(("file", "words", "cls"), map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table({**columns, "other": [0.0] * len(rows)}), file)
    else:
        table(file, rows, ("file", "words", "cls"))
    columns = ["--path-column", "file", "--caption-column", "words", "--label-column", "cls"]
    assert run("table", file, tmp_path / "out", "--root", pictures, *columns) == 0
    found = samples(tmp_path / "out")
    assert len(found) == 13
    for sample in found:
        path, caption, label = rows[json.loads(sample["json"])["label"]]
        assert (sample["txt"].decode(), int(sample["__key__"])) == (caption, label)
        assert sample["jpg"] == (pictures / path).read_bytes()


def test_what_cannot_be_used_is_named_and_counted(tmp_path, pictures, capsys):
    (pictures / "cut.jpg").write_bytes(jpeg(0, 64)[:700])
    (pictures / "text.png").write_bytes(b"no picture")
    good = [(path.name, "fine", 1) for path in sorted(pictures.glob("img*.jpg"))]
    bad = [
        ("cut.jpg", "a", 1),
        ("text.png", "a", 1),
        ("gone.jpg", "a", 1),
        (good[0][0], " ", 1),
        (good[0][0], "a", "x"),
    ]
    file = table(tmp_path / "pairs.csv", good + bad)
    options = ["table", file, tmp_path / "out", "--root", pictures, "--label-column", "label"]
    assert run(*options) == 1
    assert "above the 0 that --max-rejected allows" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out") is None
    assert run(*options, "--max-rejected", 0.5) == 0
    assert len(samples(tmp_path / "out")) == len(good)
    assert read_manifest(tmp_path / "out")["rejected"] == 5
    with open(tmp_path / "out" / "rejected.tsv", newline="") as lines:
        rejected = list(csv.reader(lines, delimiter="\t"))
    assert rejected[0] == ["what", "why"]
    assert sorted(what for what, _ in rejected[1:]) == sorted(row[0] for row in bad)


def test_wrong_tables_are_explained(tmp_path, pictures, capsys, monkeypatch):
    def message(*arguments):
        assert run(*arguments) == 1
        return capsys.readouterr().err

    good = table(tmp_path / "pairs.csv", [("a.jpg", "a", 1)])
    latin = tmp_path / "latin.csv"
    latin.write_bytes("path,caption\na.jpg,é\n".encode("latin-1"))
    (tmp_path / "bad.parquet").write_text("nothing")
    (tmp_path / "pairs.xls").write_text("nothing")
    empty = table(tmp_path / "empty.csv", [])
    out = tmp_path / "out"
    assert "no table at" in message("table", tmp_path / "none.csv", out)
    assert "has no column 'words'; it has ['path', 'caption', 'label']" in message(
        "table", good, out, "--caption-column", "words"
    )
    assert "latin.csv cannot be read" in message("table", latin, out)
    assert "bad.parquet cannot be read" in message("table", tmp_path / "bad.parquet", out)
    assert "is not a .csv, .tsv or .parquet" in message("table", tmp_path / "pairs.xls", out)
    assert "has no samples" in message("table", empty, out)
    assert "no folder at" in message("folder", tmp_path / "none", out)
    assert "--max-rejected 2.0" in message("folder", pictures, out, "--max-rejected", 2)
    assert "--samples-per-shard 0" in message("folder", pictures, out, "--samples-per-shard", 0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install '.[data]' in the checkout" in message("table", tmp_path / "bad.parquet", out)


def test_files_that_are_no_samples_are_counted(tmp_path, pictures, capsys):
    for name in ("a.heic", "b.gif", "._img.01.jpg", "lonely.txt"):
        (pictures / name).write_bytes(b"x")
    assert run("folder", pictures, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "13 read, 13 delivered, 0 rejected, 4 files ignored" in printed and "first a.heic" in printed
    assert read_manifest(tmp_path / "out")["account"]["ignored"] == {
        "caption without a picture": 1,
        "kind that is not read": 2,
        "system file": 1,
    }


def test_a_name_that_is_no_unicode_is_rejected_by_its_escape(tmp_path, pictures):
    (pictures / "q\udcff.jpg").write_bytes(b"no picture")
    (pictures / "q\udcff.heic").touch()
    assert run("folder", pictures, tmp_path / "out", "--max-rejected", 0.9) == 0
    assert rb"q\udcff.jpg" in (tmp_path / "out" / "rejected.tsv").read_bytes()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, pictures, capsys):
    (tmp_path / "file").touch()
    assert run("folder", pictures, tmp_path / "file" / "out") == 1
    assert ": Not a directory; check the path\n" in capsys.readouterr().err


@pytest.mark.parametrize("caption", ["&nbsp;", "\0\0", "\u200b", " \ufeff "])
def test_a_caption_that_cleans_to_nothing_is_no_caption(tmp_path, pictures, caption):
    (pictures / "img.01.txt").write_text(caption, "utf-8")
    assert run("folder", pictures, tmp_path / "out", "--max-rejected", 0.1) == 0
    assert read_manifest(tmp_path / "out")["account"]["rejected"] == {"no caption": 1}


def test_a_captions_table_may_name_pictures_by_absolute_paths(tmp_path, pictures):
    paths = [path for path in sorted(pictures.rglob("*.jpg")) if path.is_file()]
    names = [path if n % 2 else f"./{path.relative_to(pictures)}" for n, path in enumerate(paths)]
    captions = table(tmp_path / "captions.csv", [(name, "a caption") for name in names], ("path", "caption"))
    assert run("folder", pictures, tmp_path / "out", "--captions", captions) == 0
    assert len(samples(tmp_path / "out")) == 13


def test_labels_as_pandas_writes_them(tmp_path, pictures):
    file = table(tmp_path / "pairs.csv", [(path.name, "a", "3.0") for path in sorted(pictures.glob("img*.jpg"))])
    assert run("table", file, tmp_path / "out", "--root", pictures, "--label-column", "label") == 0
    assert {json.loads(sample["json"])["label"] for sample in samples(tmp_path / "out")} == {3}


def test_the_same_command_reads_finished_shards_again(tmp_path, pictures, capsys):
    assert run("folder", pictures, tmp_path / "out") == 0 and run("folder", pictures, tmp_path / "out") == 0
    assert "every byte read again and equal to manifest.json" in capsys.readouterr().out
    shard = tmp_path / "out" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    assert run("folder", pictures, tmp_path / "out") == 1
    assert "1 of 1 shards in" in (error := capsys.readouterr().err) and "00000.tar" in error


# --- kill and resume ---


def _kill_the_run(index, row, root, original=write_shards.sample_of):
    if index == 7:
        os.kill(os.getppid(), signal.SIGKILL)
    return original(index, row, root)


def test_shards_of_someone_else_are_never_replaced(tmp_path, pictures, capsys):
    out = tmp_path / "download"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"a download")
    assert run("folder", pictures, out) == 1
    assert "holds 00000.tar and no manifest.json" in capsys.readouterr().err
    assert (out / "00000.tar").read_bytes() == b"a download"


def test_captions_that_were_corrected_are_other_samples(tmp_path, pictures, capsys):
    out = tmp_path / "out"
    assert run("folder", pictures, out) == 0
    next(pictures.glob("*.txt")).write_text("a better caption")
    assert run("folder", pictures, out) == 1
    assert "already holds shards" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(tmp_path, pictures, monkeypatch, capsys):
    arguments = ["folder", str(pictures), str(tmp_path / "out"), "--samples-per-shard", "1", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "sample_of", _kill_the_run)
        process = multiprocessing.get_context("fork").Process(target=write_shards.main, args=(arguments,))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    out = tmp_path / "out"
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(written) < 13 and read_manifest(out) is None
    assert write_shards.main([*arguments[:3], "--samples-per-shard", "2"]) == 1
    assert "unfinished run" in capsys.readouterr().err
    damaged = min(written)
    damaged.write_bytes(damaged.read_bytes()[:-512])  # does not agree with its record: written again

    assert write_shards.main(arguments) == 0
    kept = [path for path, time in written.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == len(written) - 1 and damaged not in kept
    whole = tmp_path / "whole"
    assert write_shards.main([*arguments[:2], str(whole), *arguments[3:]]) == 0
    assert read_manifest(out)["shards"] == read_manifest(whole)["shards"]
    assert len({sample["__key__"] for sample in samples(out)}) == 13
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []

    before = (out / "manifest.json").stat().st_mtime_ns
    assert write_shards.main(arguments) == 0 and (out / "manifest.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert write_shards.main([*arguments[:3], "--samples-per-shard", "2"]) == 1
    assert "already holds shards of" in capsys.readouterr().err


# --- img2dataset ---


@pytest.fixture
def download(tmp_path):
    """img2dataset's output: two shards of 6 and 4 samples, statistics beside them."""
    folder = tmp_path / "download"
    folder.mkdir()
    for shard, count in enumerate((6, 4)):
        found = (
            {"__key__": f"{shard:05d}{n:04d}", "jpg": jpeg(n), "txt": b"a text", "json": b'{"status": "success"}'}
            for n in range(count)
        )
        write_tar(folder / f"{shard:05d}.tar", found)
        stats = {"count": count + 3, "successes": count, "failed_to_download": 3, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        status = ["success"] * count + ["failed_to_download"] * 3
        parquet.write_table(pyarrow.table({"status": status}), folder / f"{shard:05d}.parquet")
    return folder


def test_a_download_gets_its_manifest_where_it_stands(download):
    (download / "00001_stats.json").unlink()  # its table still says how many there are
    before = [path.stat().st_mtime_ns for path in sorted(download.glob("*.tar"))]
    assert run("img2dataset", download, "--source", "CC3M") == 0
    assert len(samples(download)) == 10 and read_manifest(download)["source"] == "CC3M"
    assert [path.stat().st_mtime_ns for path in sorted(download.glob("*.tar"))] == before


def test_unfinished_and_damaged_downloads_are_refused(download, capsys, tmp_path):
    def message(*arguments):
        assert run(*arguments) == 1 and read_manifest(download) is None
        return capsys.readouterr().err

    assert "there are no shards" in message("img2dataset", tmp_path)
    first = download / "00000.tar"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert "img2dataset says 6" in message("img2dataset", download)
    first.unlink()
    assert "00000.tar is missing" in message("img2dataset", download)
    first.write_bytes(whole)
    for file in (download / "00001_stats.json", download / "00001.parquet"):
        file.unlink()
    assert "has neither 00001_stats.json nor 00001.parquet" in message("img2dataset", download)


def test_incomplete_samples_of_a_download_are_counted(download, capsys):
    write_tar(
        download / "00000.tar", ({"__key__": str(n), "jpg": jpeg(n), "txt": b" " if n else b"a"} for n in range(6))
    )
    assert run("img2dataset", download) == 1
    assert "5 samples cannot be used" in capsys.readouterr().err
    assert run("img2dataset", download, "--max-rejected", 0.5) == 0
    assert read_manifest(download)["rejected"] == 5
    assert "00000.tar:3\tno caption" in (download / "rejected.tsv").read_text()


def test_gaps_in_the_numbers_of_a_download_are_said(download, capsys):
    for file in download.glob("00001*"):
        file.rename(download / file.name.replace("00001", "00003"))
    assert run("img2dataset", download) == 0
    assert "2 numbers are missing among the shards, first 00001" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [("", "it is empty"), ('{"count": 5}', "no number of successes")])
def test_statistics_that_say_nothing(download, capsys, content, message):
    (download / "00000_stats.json").write_text(content)
    assert run("img2dataset", download) == 1
    assert "00000_stats.json" in (error := capsys.readouterr().err) and message in error

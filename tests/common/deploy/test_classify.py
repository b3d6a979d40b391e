"""`effclip classify` from the command line to its rows, its summary and its exit code."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.arguments import read_labels
from common.cli import main
from common.data.embedded import module as embedded
from common.data.embedded.folder import main as write_folder
from common.data.embedded.shapes import class_names
from common.deploy.model import load
from tests.common.fresh import answers
from tests.common.towers import NAMES, tiny_directory


@pytest.fixture
def model(tmp_path):
    return str(tiny_directory(tmp_path / "model"))


@pytest.fixture
def folder(tmp_path):
    """Nine pictures in two folders, and one that is none."""
    random = np.random.default_rng(0)
    for n in range(9):
        file = tmp_path / "pictures" / "ab"[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    (tmp_path / "pictures" / "b" / "broken, said one.jpg").write_bytes(b"no picture")
    return str(tmp_path / "pictures")


def test_rows_as_csv_and_as_json_lines_say_what_python_says(model, folder, tmp_path, capsys):
    expected = load(model, device="cpu").classify(folder, threshold=0.01)
    line = ["classify", folder, "--model", model, "--threshold", "0.01", "--device", "cpu"]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert main([*line, "--out", str(tmp_path / "sub" / "rows.csv"), "--batch-size", "2"]) == 0
    assert main([*line, "--out", str(tmp_path / "rows.jsonl"), "--workers", "1"]) == 0
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    written = list(csv.DictReader((tmp_path / "sub" / "rows.csv").open(newline="")))
    assert [row | {"probability": ""} for row in rows] == [row | {"probability": ""} for row in written]
    # Sums round differently in batches of another size.
    probabilities = [[float(row["probability"] or 0) for row in table] for table in (rows, written)]
    assert probabilities[0] == pytest.approx(probabilities[1], rel=1e-4)
    parsed = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(parsed) == len(expected) == 10
    for answer, row, other in zip(expected, rows, parsed, strict=True):
        assert row["picture"] == other["picture"] == answer.picture
        if answer.error:
            assert row["label"] == "" and other["label"] is None and row["error"] == other["error"] == answer.error
            continue
        assert row["label"] == other["label"] == answer.label and int(row["level"]) == other["level"] == answer.level
        assert float(row["probability"]) == pytest.approx(answer.probability, rel=1e-4)
        assert other["gmacs"] == pytest.approx(answer.gmacs)
    mean = np.mean([answer.gmacs for answer in expected if not answer.error])
    for said in ("9 pictures in ", "1 that could not be read", f"mean cost {mean:.4g} GMACs", "(threshold 0.01)"):
        assert said in printed.err
    assert main(line[:4]) == 0
    assert "stopped: 9 at level 1 (no threshold: all levels)" in capsys.readouterr().err


def test_only_strict_makes_a_damaged_picture_a_failure(model, folder, capsys):
    line = ["classify", folder, "--model", model]
    assert main(line) == 0
    assert main([*line, "--strict"]) == 1
    assert main(["classify", folder + "/a", "--model", model, "--strict"]) == 0
    assert "it is none of JPEG, PNG" in capsys.readouterr().out


def test_a_row_names_as_many_classes_as_asked_for(model, folder, capsys):
    line = ["classify", folder, "--model", model, "--device", "cpu"]
    assert main([*line, "--topk", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0])[-4:] == ["gmacs", "error", "label_2", "probability_2"]
    assert main([*line, "--topk", "all", "--format", "jsonl"]) == 0
    parsed = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    for row, other in zip(rows, parsed, strict=True):
        if row["error"]:
            assert row["label_2"] == row["probability_2"] == "" and other["top"] == []
            continue
        assert sorted(label for label, _ in other["top"]) == sorted(NAMES)
        assert sum(probability for _, probability in other["top"]) == pytest.approx(1, abs=1e-5)
        assert [label for label, _ in other["top"][:2]] == [row["label"], row["label_2"]]
        assert other["top"][1][1] == pytest.approx(float(row["probability_2"]), rel=1e-4)


def _input(text):
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def test_paths_from_the_input_stream(model, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", _input(f"{folder}/a/0.png\n\n{folder}/b/1.png\n"))
    assert main(["classify", "-", "--model", model]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["picture"] for row in rows] == [f"{folder}/a/0.png", f"{folder}/b/1.png"]
    monkeypatch.setattr(sys, "stdin", _input(""))
    assert main(["classify", "-", "--model", model]) == 1
    assert "no path came over the input stream" in capsys.readouterr().err


def test_the_summary_as_a_file(model, folder, tmp_path, capsys):
    line = ["classify", folder, "--model", model, "--device", "cpu", "--threshold", "0.01", "--dtype", "bfloat16"]
    assert main([*line, "--stats", str(tmp_path / "summary.json")]) == 0
    stats, printed = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr()
    costs = [float(row["gmacs"]) for row in csv.DictReader(io.StringIO(printed.out)) if row["gmacs"]]
    assert (stats["pictures"], stats["damaged"], stats["dtype"]) == (9, 1, "bfloat16")
    assert stats["mean_gmacs"] == pytest.approx(np.mean(costs), rel=1e-4) and sum(stats["levels"].values()) == 9
    assert 0 < stats["start_up_seconds"] < stats["seconds"]
    assert printed.err.splitlines()[0] == "threshold 0.01, as asked"


def test_labels_from_the_line_or_a_file(model, folder, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("cat\n\n dog \n", encoding="utf-8-sig")  # as some editors save it
    for words in (["--labels", "cat, dog"], ["--labels-file", str(tmp_path / "labels.txt")]):
        assert main(["classify", folder, "--model", model, "--template", "the {}", *words]) == 0
        found = {row["label"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
        assert found <= {"cat", "dog", ""}


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "labels.txt").write_bytes("café\nthé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.txt is no UTF-8 text \(byte 3: .*\); save it as UTF-8"):
        read_labels(None, str(tmp_path / "labels.txt"))


def test_a_reader_that_has_seen_enough_ends_it_quietly(model, folder, monkeypatch):
    """As in `effclip classify FOLDER | head -1`: rows go into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["classify", folder, "--model", model, "--device", "cpu"]) == 128 + 13


def test_a_mistake_leaves_the_rows_of_an_earlier_run(model, folder, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("mine\n")
    assert main(["classify", folder, "--model", model, "--out", str(rows), "--labels", "cat,zebra"]) == 1
    assert rows.read_text() == "mine\n" and "['zebra'] in 'a zebra' is not in" in capsys.readouterr().err


def test_the_default_model_knows_emoji_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(embedded.SPLITS, 2, {"test": (40, 20)})
    assert write_folder([str(tmp_path / "emoji"), "--pictures", "40"]) == 0
    assert main(["classify", str(tmp_path / "emoji")]) == 0
    printed = capsys.readouterr()
    assert "the embedded WaveCLIP" in printed.err and "refuses words outside" in printed.err
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert len(rows) == 40 and {row["label"] for row in rows} <= set(class_names("seen"))
    # By chance none of forty among hundreds of names.
    assert sum(row["picture"].split("/")[-2] == row["label"] for row in rows) >= 5
    assert main(["classify", str(tmp_path / "emoji"), "--labels", "perceptron,backpropagation"]) == 1
    error = capsys.readouterr().err
    assert "is not in this model's vocabulary" in error and "use words that it was trained with" in error
    assert write_folder([str(tmp_path / "more"), "--pictures", "41"]) == 1


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--labels", "cat"], "at least two different names, not 1 of them"),
        (["--labels", "a,b", "--labels-file", "x"], "--labels and --labels-file both name the classes"),
        (["--labels-file", "nowhere.txt"], "no labels at"),
        (["--template", "a photo"], "has no {} for the class name"),
        (["--out", "rows.xlsx"], "rows are written as .csv or .jsonl"),
        (["--gmacs", "0.0001"], "run `effclip calibrate"),
        (["--gmacs", "1e-9"], "GMACs at least; give that or more"),
        (["--out", "rows.csv", "--format", "jsonl"], "leave one of them out"),
        (["--stats", "summary.txt"], "the summary is written as .json"),
        (["--calibration", "nightly"], "effclip calibrate --calibration nightly` makes one"),
        (["--calibration", "a.json", "--threshold", "0.1"], "both choose a threshold"),
    ],
)
def test_a_users_mistake_is_one_line(model, folder, others, message, capsys):
    first, last = load(model, device="cpu").costs
    others = [str((first + last) / 2) if word == "0.0001" else word for word in others]
    assert main(["classify", folder, "--model", model, "--device", "cpu", *others]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("effclip classify: error: ") and message in error


def test_what_is_missing_is_said_before_a_model_is_loaded(folder, capsys):
    assert main(["classify", "nowhere.jpg", "--model", "nothing/either"]) == 1
    assert "no picture and no folder at" in capsys.readouterr().err
    assert main(["classify", folder, "--weights", "openai"]) == 1
    assert "belong to a --model" in capsys.readouterr().err


def test_help_and_mistakes_in_the_line_need_no_torch():
    lines = (
        (["classify", "--help"], 0, "--labels-file"),
        (["classify"], 2, "PATH"),
        (["classify", "x.jpg", "--topk", "five"], 2, "--topk: 'five' is neither a number of classes nor all"),
        (["classify", "x.jpg", "--labels", "cat"], 1, "two different names"),
        (["classify", "nowhere.jpg"], 1, "no picture and no folder at"),
        (["classify", "x.jpg", "--gmacs", "1", "--threshold", "0.1"], 1, "two ways to say one thing; give one of them"),
        (["evaluate", "--model", "nowhere.pt", "--data", "embedded"], 1, "no weights at"),
        (["models"], 0, "the embedded WaveCLIP"),
        (["--version"], 0, "efficient-clip "),
        (["calibrate", "--data", "embedded"], 2, "--accuracy"),
        (["convert", "nowhere.ckpt", "d"], 1, "no checkpoint at"),
        (["convert", str(Path(__file__).parent), "d"], 1, "is a folder; name the checkpoint or weights file in it"),
        (["convert", __file__, str(Path(__file__).parent)], 1, "is there already; name a new folder"),
        (["export", "nowhere", "--format", "pdf"], 2, "torch-export"),
        (["export", "nowhere", "--format", "onnx", "--keep", "half"], 2, "'half' must be a share of the tokens"),
        (["export", "nowhere.pt", "--format", "onnx", "--out", "new"], 1, "no weights at"),
        (["export", "nowhere", "--format", "onnx"], 1, "--out must say where"),
        (["doctor", "--help"], 0, "doctor"),
    )
    found = answers([arguments for arguments, _, _ in lines])
    for (_, code, said), answer in zip(lines, found, strict=True):
        assert answer.code == code, answer.printed[-2000:]
        assert said in answer.printed and "torch" not in answer.imported


def test_a_name_that_the_screen_lacks_is_shown_escaped(model, tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "日.png")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "latin-1"))
    assert main(["classify", str(tmp_path), "--model", model, "--labels", ",".join(NAMES)]) == 0
    assert rb"\u65e5.png," in screen.getvalue()


def test_files_of_other_kinds_are_left_out_aloud(model, tmp_path, capsys):
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / "a.heic").touch()
    assert main(["classify", str(tmp_path / "mixed"), "--model", model, "--labels", ",".join(NAMES)]) == 0
    assert "\n1 file left out: 1 .heic\n" in capsys.readouterr().err


def test_names_that_are_no_unicode(model, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "odd" / "fine.png")
    (tmp_path / "odd" / "fine.png").rename(tmp_path / "odd" / "\udcff.png")
    for out in ([], ["--out", str(tmp_path / "rows.csv")], ["--out", str(tmp_path / "rows.jsonl")]):
        assert main(["classify", str(tmp_path / "odd"), "--model", model, "--labels", ",".join(NAMES), *out]) == 0
    assert r"odd/\udcff.png" in capsys.readouterr().out
    assert b"odd/\xff.png" in (tmp_path / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{picture}", ""], "a path is empty"),
        (["{picture}", "--device", "foo"], "device 'foo' computes nothing here"),
        (["{picture}", "--device", "meta"], "device 'meta' computes nothing here"),
        (["{picture}", "--out", "{folder}.csv"], "is a folder; name a file"),
    ],
)
def test_a_mistake_in_the_line_is_one_sentence(words, sentence, model, folder, capsys):
    Path(f"{folder}.csv").mkdir(exist_ok=True)
    line = [word.format(picture=f"{folder}/a/0.png", folder=folder) for word in words]
    assert main(["classify", *line, "--model", model]) == 1
    assert sentence in capsys.readouterr().err

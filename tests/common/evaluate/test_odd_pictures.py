"""`effclip evaluate` on pictures of one's own that are damaged, turned, or replaced under the same names."""

import json

import numpy as np
import pytest
from PIL import Image

from common.cli import main
from tests.readme import ROOT

WEIGHTS = ROOT / "benchmarks" / "weights" / "shapes_clip.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of three pictures each."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    rng = np.random.default_rng(0)
    for name in ("hammer", "accordion"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{number}.png")
    return tmp_path / "own"


def evaluate(folder, *others):
    arguments = ["--model", str(WEIGHTS), "--data", str(folder), "--template", "a {}", "--workers", "0", *others]
    return main(["evaluate", *arguments])


def results(folder):
    return [json.loads(file.read_text()) for file in (folder.parent / "runs" / "evaluations").glob("*.json")]


def test_pictures_replaced_under_the_same_names_are_a_new_result(folder, capsys):
    assert evaluate(folder) == 0 and evaluate(folder) == 0
    assert capsys.readouterr().out.count("done before") == 1
    for file in folder.rglob("*.png"):
        Image.new("RGB", (64, 64), "blue").save(file)
    assert evaluate(folder) == 0
    assert "done before" not in capsys.readouterr().out and len(results(folder)) == 2


def test_the_result_holds_the_account_and_the_rule_of_orientation(folder, capsys):
    (folder / "hammer" / "._0.png").write_bytes(b"another file system's")
    (folder / "hammer" / "3.heic").write_bytes(b"another kind")
    assert evaluate(folder) == 0
    (result,) = results(folder)
    ignored = {"kind that is not read": 1, "system file": 1}
    assert result["conditions"]["account"] == {"read": 6, "delivered": 6, "rejected": {}, "ignored": ignored}
    assert result["conditions"]["orientation"] == "turned by EXIF"
    assert "samples: 6 read, 6 delivered, 0 rejected, 2 files ignored" in capsys.readouterr().out


def test_a_home_folder_may_be_written_as_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert main(["evaluate", "--model", str(WEIGHTS), "--data=~/own", "--template", "a {}", "--workers", "0"]) == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_one_line_that_names_it(folder, capsys, workers):
    (folder / "hammer" / "9.png").write_bytes(b"<html>404</html>")
    assert evaluate(folder, "--workers", workers) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"effclip evaluate: error: {folder}/hammer/9.png is no picture that can be read (it is none of"
    )

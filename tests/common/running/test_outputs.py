"""Commands whose output has no room leave nothing half-written, and say so in one sentence."""

import resource
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from common.cli import main
from common.clip import CLIP
from common.paths import written_whole
from tests.common.towers import NAMES, tiny_directory


@contextmanager
def files_of_at_most(size):
    """A limit on the size of this process's files stands for a full disk; it needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def weights(tmp_path):
    """A weights file of the tiny CLIP."""
    CLIP.tiny().save(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_full_disk_leaves_nothing_half_written(weights, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    line = ["classify", str(tmp_path / "a.png"), "--model", str(weights), "--labels", "cat,dog"]
    with files_of_at_most(10):
        for command in (
            [*line, "--out", str(out / "rows.csv")],
            ["convert", str(weights), str(out / "model")],
        ):
            assert main(command) == 1
            printed = capsys.readouterr()
            assert "error: " in printed.err and "Traceback" not in printed.err
            assert not out.exists() or not list(out.iterdir())


def test_a_full_disk_leaves_no_half_of_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    model = tiny_directory(tmp_path / "model")
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "0.png")
    line = ["--model", str(model), "--data", str(tmp_path / "data"), "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", *line]) == 0  # and the class embeddings are in their cache
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with files_of_at_most(10):
        for command in (
            ["evaluate", *line, "--out", str(tmp_path / "out")],
            ["evaluate", *line, "--template", "{}"],
            ["calibrate", *line, "--gmacs", "1"],
            ["classify", str(tmp_path / "data"), "--model", str(model), "--stats", str(tmp_path / "stats.json")],
        ):
            assert main(command) == 1
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith(f"effclip {command[0]}: error: ")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_folder_that_takes_no_files_is_one_sentence(weights, capsys):
    assert main(["convert", str(weights), "/proc/model"]) == 1
    assert "/proc" in capsys.readouterr().err


def test_what_is_written_whole_is_there_or_not(tmp_path):
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"), written_whole(tmp_path / "a") as part:
        part.write_bytes(bytes(100))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_converted(tmp_path, capsys):
    content = {
        "state_dict": {"clip.logit_scale": torch.tensor(float("nan"))},
        "global_step": 3,
        "hyper_parameters": {"_class_path": "common.pretraining.CLIPPretraining"},
    }
    torch.save(content, tmp_path / "nan.ckpt")
    assert main(["convert", str(tmp_path / "nan.ckpt"), str(tmp_path / "model")]) == 1
    assert "nan.ckpt holds weights that are not finite (clip.logit_scale); take an earlier" in capsys.readouterr().err

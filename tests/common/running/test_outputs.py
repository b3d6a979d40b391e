"""Commands whose output has no room leave nothing half-written, and say so in one sentence."""

import resource
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from common.cli import main
from common.clip import CLIP
from common.paths import written_whole


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

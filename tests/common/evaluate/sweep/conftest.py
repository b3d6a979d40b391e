"""A folder of noise with splits, a small CLIP, and the command."""

import numpy as np
import pytest
from PIL import Image

from common.cli import main
from tests.common.towers import NAMES, tiny_directory


@pytest.fixture
def data(tmp_path):
    """Folders train, val and test of 8 pictures of noise in each class, which the tiny CLIP's words name."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in NAMES:
            for number in range(8):
                file = tmp_path / "data" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                spread = random.integers(1, 256)
                Image.fromarray(random.integers(0, spread, (32, 32, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "data")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model directory of the tiny CLIP; runs in the test's folder."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    return str(tiny_directory(tmp_path / "model", levels=0))


@pytest.fixture
def sweep(data, tmp_path):
    """Run `effclip sweep` on the folder; speed is not measured unless asked for."""

    def run(model, *others, out="out", timed="no"):
        line = ["sweep", "--model", model, "--data", data, "--template", "{a} {}", "--out", str(tmp_path / out)]
        return main([*line, "--workers", "0", "--device", "cpu", "--timed", timed, *others])

    return run

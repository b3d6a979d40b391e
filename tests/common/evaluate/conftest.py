"""A miniature of the embedded benchmark, and a random model that knows its words."""

import pytest
import torch

from common.clip import CLIP
from common.data.embedded import module as embedded
from common.data.embedded.shapes import vocabulary


@pytest.fixture
def miniature(monkeypatch, tmp_path):
    """A random CLIP over the embedded vocabulary as a file; a few pictures a split; runs in the test's folder."""
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    monkeypatch.setitem(embedded.SPLITS, 2, sizes)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    kept = vocabulary()
    text = {"context_length": 32, "vocab_size": len(kept), "vocabulary": kept, "width": 32, "heads": 1, "layers": 1}
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32}
    torch.manual_seed(0)
    file = tmp_path / "random.safetensors"
    CLIP({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}).save(file)
    return str(file)

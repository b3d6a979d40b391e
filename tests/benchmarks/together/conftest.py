"""Photographs with models of random weights, which several files measure."""

import pytest
import torch

from benchmarks.together import deploy_cases
from benchmarks.together.photo_models import spelling
from benchmarks.together.photos import stand_in
from common.clip import CLIP
from waveclip import WaveTower


@pytest.fixture(params=["cifar10"])
def photographs(request, monkeypatch, tmp_path):
    """A folder of three classes, and models of random weights for it in the place of committed ones."""
    for split in ("train", "test"):
        stand_in(tmp_path / request.param / split)
    texts = [f"a photo of a {name}." for name in ("circle", "square", "triangle")]
    architecture = spelling(texts, "common/photos_clip.json")
    architecture["vision_cfg"] |= {"layers": 1}
    torch.manual_seed(0)
    clip = CLIP(architecture).eval()
    weights = tmp_path / "weights"
    written = f"photos_{request.param.lower().replace(' ', '_')}"
    clip.save(weights / f"{written}_clip.safetensors")
    small = architecture["vision_cfg"] | {"image_size": architecture["vision_cfg"]["image_size"] // 2}
    CLIP(architecture | {"vision_cfg": small}).save(weights / f"{written}_clip_half.safetensors")
    wave = WaveTower.from_image_tower(clip.image_tower)
    wave.save(weights / f"{written}_waveclip.safetensors", architecture, torch.float32)
    monkeypatch.setattr(deploy_cases, "WEIGHTS", weights)
    for name in ("DENSE", "WAVECLIP", "FIRST", "EVERY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / request.param

"""The embedded block on tiny models and pictures: the same answers as the real early exit, and its words."""

import json

import pytest
import torch

from benchmarks import embedded
from benchmarks.embedded import counts, markdown, observe
from benchmarks.waveclip.exits import Outcomes
from benchmarks.waveclip.fig4 import compare_gates
from common.clip import CLIP
from common.testing import TINY_CAPTIONS
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

PROMPTS = list(TINY_CAPTIONS)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    return clip, WaveTower.from_image_tower(clip.image_tower).eval()


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(4, 3, 32, 32, generator=generator),
            "label": torch.randint(len(PROMPTS), (4,), generator=generator),
        }
        for _ in range(3)
    ]


def test_outcomes_are_what_the_real_early_exit_answers(tiny, loader):
    clip, wave = tiny
    seen = observe(clip, wave, loader, PROMPTS)
    classes, scale = embed_prompts(clip, PROMPTS), clip.logit_scale.exp()
    threshold = float(seen.margin.sort().values[5:7].mean())
    expected, refined = seen.at(threshold)
    classify = ProgressiveClassifier(wave, classes, scale, MarginGate(threshold)).eval()
    predictions = [(classify(batch["image"]), batch["label"]) for batch in loader]
    right = torch.cat([made.scores.argmax(-1) == label for made, label in predictions])
    assert right.tolist() == expected.tolist()
    steps = torch.cat([made.exit_step for made, _ in predictions])
    assert steps.float().mean().item() == pytest.approx(refined) == pytest.approx(0.5)
    assert len(seen.teacher) == 12


def test_two_levels_are_refused(tiny, loader):
    clip = CLIP.tiny()
    with pytest.raises(ValueError, match="2 levels"):
        observe(clip, WaveTower.from_image_tower(clip.image_tower, levels=2), loader, PROMPTS)


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "TEACHER", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="make retrain"):
        embedded.models()


def test_counts_by_part(monkeypatch):
    monkeypatch.setattr(embedded, "PART", 2)
    right = torch.tensor([True, False, True, True, True])
    of = Outcomes(torch.rand(5), torch.rand(5), right, ~right, right, right)
    assert counts(of) == {"teacher": [1, 2, 1], "coarse": [1, 2, 1], "fine": [1, 0, 0]}


def test_block_in_words():
    row = {
        "accuracy": 0.6, "interval": [0.59, 0.61], "against_teacher": [-0.01, -0.02, 0.0], "tokens": 38,
        "gmacs": 0.03, "images_per_second": {"1": 100.0, "64": 900.0}, "speed_ratio": {"1": 0.9, "64": 1.2},
    }  # fmt: skip
    stated = {
        "names": 1291,
        "rule": "a rule",
        "dtype": "float32",
        "device": "CPU",
        "threads": 2,
        "torch": "2",
    }
    block = {
        "conditions": stated,
        "pictures": {"val": 4000, "test": 20656},
        "rows": [
            {"method": "teacher (dense)", "refined": None} | row,
            {"method": "full", "refined": 1.0} | row,
        ],
        "headline": {"reasons": ["too near"], "goals": []},
    }
    text = markdown(json.loads(json.dumps(block)))
    assert "| full | 100.0 % | 60.0 [59.0, 61.0] | -1.0 [-2.0, +0.0] | 38.0 | 0.0300 | 0.0 % |" in text
    assert "No headline: too near." in text
    assert "1,291 names" in text and "a rule" in text and "20,656 test pictures" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_gates_compared_at_equal_shares():
    generator = torch.Generator().manual_seed(2)
    margin = torch.rand(200, generator=generator)
    coarse, fine = (torch.rand(200, generator=generator) < 0.5 for _ in range(2))
    found = compare_gates(Outcomes(margin, margin, coarse, fine, fine, coarse == fine))
    assert found["gates"]["margin"] == found["gates"]["maximum"]
    assert all(point["difference"] == (0.0, 0.0, 0.0) for point in found["points"])
    histograms = found["gates"]["margin"]["histograms"]
    assert sum(histograms["right"]) == int(coarse.sum()) and sum(histograms["wrong"]) == int((~coarse).sum())

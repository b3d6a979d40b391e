"""Answers observed once give, at any threshold, what the real early exit answers."""

import numpy as np
import pytest
import torch

from benchmarks.waveclip import observed
from benchmarks.waveclip.observed import counts, observe
from common.clip import CLIP
from common.testing import TINY_CAPTIONS
from common.zeroshot import embed_prompts
from waveclip import MarginGate, MaxProbabilityGate, ProgressiveClassifier, WaveTower

PROMPTS = list(TINY_CAPTIONS)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIP.tiny().eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(8, 3, 32, 32, generator=generator),
            "label": torch.randint(len(PROMPTS), (8,), generator=generator),
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize("levels", [1, 2])
def test_exits_are_those_of_the_real_classifier(clip, batches, levels):
    wave = WaveTower.from_image_tower(clip.image_tower, levels=levels).eval()
    answers = observe(clip, wave, batches, PROMPTS)
    assert answers.margin.shape == (levels, 16) and answers.correct.shape == (levels + 1, 16)
    classes, scale = embed_prompts(clip, PROMPTS), clip.logit_scale.exp()
    labels = torch.cat([batch["label"] for batch in batches])
    ordered = answers.margin.flatten().sort().values
    for threshold in ((ordered[1:] + ordered[:-1]) / 2)[::4].tolist():
        classify = ProgressiveClassifier(wave, classes, scale, MarginGate(threshold)).eval()
        predictions = [classify(batch["image"]) for batch in batches]
        correct, shares = answers.at(threshold)
        guesses = torch.cat([prediction.scores.argmax(-1) for prediction in predictions])
        assert (guesses == labels).tolist() == correct.tolist()
        steps = torch.cat([prediction.exit_step for prediction in predictions])
        assert shares == [float((steps == step).double().mean()) for step in range(levels + 1)]


def test_the_second_gate_and_the_levels_agreement_are_observed_too(clip, batches):
    wave = WaveTower.from_image_tower(clip.image_tower).eval()
    answers = observe(clip, wave, batches, PROMPTS)
    classes, scale = embed_prompts(clip, PROMPTS), clip.logit_scale.exp()
    between = answers.maximum[0].sort().values[1:3].mean()  # no picture's own: its rounding differs between batches
    gate = MaxProbabilityGate(float(between))
    classify = ProgressiveClassifier(wave, classes, scale, gate).eval()
    with torch.no_grad():
        steps = torch.cat([classify(batch["image"]).exit_step for batch in batches])
        coarse, fine = (torch.cat(z) for z in zip(*(wave(batch["image"]) for batch in batches), strict=True))
        guesses = [classify.probabilities(z).argmax(-1) for z in (coarse, fine)]
    assert (steps == 0).tolist() == (answers.maximum[0] >= gate.threshold).tolist()
    assert answers.agrees[0].tolist() == (guesses[0] == guesses[1]).tolist()


def test_counts_by_part(monkeypatch):
    monkeypatch.setattr(observed, "PART", 2)
    right = np.array([True, False, True, True, True])
    assert counts({"coarse": ~right, "fine": right}) == {"coarse": [1, 0, 0], "fine": [1, 2, 1]}


def test_a_whole_read_of_test_is_logged_and_no_other(monkeypatch):
    logged = []
    monkeypatch.setattr(observed, "observe", lambda *others: None)
    monkeypatch.setattr(observed, "batches", lambda *others, **more: None)
    monkeypatch.setattr(observed.read_log, "record", lambda table, data, weights: logged.append(data))
    observed._observed.cache_clear()
    for split, smoke in (("val", False), ("test", True), ("test", False), ("test", False)):
        observed.observed(split, smoke)
    observed._observed.cache_clear()
    assert logged == ["shapes"], "once in a process"

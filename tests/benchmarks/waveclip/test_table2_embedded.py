"""The embedded block of Table 2: what it refuses, what its timed classifiers answer, and its words."""

import json

import numpy as np
import pytest
import torch

from benchmarks.embedded import PART, batches
from benchmarks.training import shapes as trained
from benchmarks.waveclip import table2_embedded
from benchmarks.waveclip.controls import CASCADE, HALF, TEACHER, TRAINED_ON, WAVE
from benchmarks.waveclip.shapes import controlled
from benchmarks.waveclip.table2_embedded import _classifiers, markdown, measure
from common.early_exit import NEVER


def test_a_control_that_is_not_trained_is_named(monkeypatch):
    monkeypatch.setattr(trained, "finished", lambda: {"shapes-teacher": {}, "shapes-waveclip": {}})
    with pytest.raises(ValueError, match=r"no answers of shapes-half, shapes-longer; `make retrain ONLY='shapes-\*'`"):
        measure({})


@torch.no_grad()
def test_what_is_timed_answers_as_the_rows_of_seed_0():
    """But for pictures between two names or at the threshold.

    Another machine left the answers, and halved pictures were rounded to eight bits there.
    """
    seen, margin = controlled("test")[0], 0.3
    rows = [{"method": name} for name in (TEACHER, TRAINED_ON, HALF)]
    rows += [{"method": f"{name} mid", "thresholds": [margin]} for name in (WAVE, CASCADE)]
    right = {**seen.right(), TEACHER: seen.right()["teacher"]}
    for name, exits in ((WAVE, seen.wave), (CASCADE, seen.cascade)):
        right[f"{name} mid"] = np.where(exits.confidence < margin, exits.second, exits.first)
    shown = list(batches("test", PART))
    for name, classify in _classifiers(rows).items():
        found = []
        for batch in shown:
            scores = classify(batch["image"])
            found.append(getattr(scores, "scores", scores).argmax(-1) == batch["label"])
        differing = int((torch.cat(found).numpy() != right[name][:PART]).sum())
        assert differing <= PART // 50, f"{name}: {differing} of {PART}"


def saving_line(method, reference, saved, refined, difference, chosen=True):
    line = {"method": method, "reference": reference, "saved": saved, "refined": refined}
    return line | {"difference": difference, "thresholds": [0.1 if chosen else NEVER] * 3, "chosen": chosen}


def test_block_in_words():
    row = {
        "accuracy": 0.6, "interval": [0.59, 0.61], "against_teacher": [-0.01, -0.02, 0.0], "tokens": 38,
        "gmacs": 0.03, "images_per_second": {"1": 100.0, "64": 900.0}, "speed_ratio": {"1": 0.9, "64": 1.2},
    }  # fmt: skip
    run = {"names": 252, "dtype": "float32", "device": "CPU", "threads": 2, "torch": "2", "test_reads": 3, "seeds": 3}
    block = {
        "conditions": run,
        "pictures": {"val": 4000, "test": 20656},
        "rows": [
            {"method": TEACHER, "refined": None} | row,
            {"method": "WaveCLIP full", "refined": 1.0, "p": 0.01} | row,
            {"method": TRAINED_ON, "refined": None, "p": 0.5} | row,
        ],
        "savings": [
            saving_line(WAVE, "teacher", [-0.02] * 3, 1.0, [-0.03, -0.04, -0.02], chosen=False),
            saving_line(CASCADE, "teacher", [0.3] * 3, 0.5, [0.0, -0.004, 0.01]),
            {"method": "WaveCLIP less cascade", "reference": "teacher", "saved": [0.0] * 3},
            saving_line(WAVE, "WaveCLIP's fine level", [0.7] * 3, 0.0, [0.02, 0.01, 0.03]),
        ],
    }
    text = markdown(json.loads(json.dumps(block)))
    assert "| teacher (dense) | – | 60.0 [59.0, 61.0] | – | – | 38.0 |" in text
    assert "| WaveCLIP full | 100.0 % | 60.0 [59.0, 61.0] | -1.0 [-2.0, +0.0] | 0.010 | 38.0 | 0.0300 | 0.0 % |" in text
    assert "| teacher trained on | – | 60.0 [59.0, 61.0] | -1.0 [-2.0, +0.0] | 0.500 |" in text
    assert "| teacher | WaveCLIP | 100.0 % | -2.0 [-2.0, -2.0] | -3.0 [-4.0, -2.0] | no saving shown:" in text
    assert "252 names" in text and "20,656 test pictures" in text and "read 3 times" in text
    assert "**Headline** (3 training seeds)" in text and "refining won nothing" in text
    block["savings"][-1] = saving_line(WAVE, "WaveCLIP's fine level", [0.3] * 3, 0.5, [0.0, -0.01, 0.01])
    assert "refining won nothing" not in markdown(block)
    run["seeds"] = 1
    assert "no headline is drawn" in markdown(block)


def test_right_answers_are_counted_by_part(monkeypatch):
    monkeypatch.setattr(table2_embedded, "PART", 2)
    right = np.array([True, False, True, True, True])
    assert table2_embedded.counts({"coarse": ~right, "fine": right}) == {"coarse": [1, 0, 0], "fine": [1, 2, 1]}

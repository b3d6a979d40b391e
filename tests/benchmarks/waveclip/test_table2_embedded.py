"""The embedded block of Table 2: what it refuses, and its words."""

import json

import pytest
import torch

from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.observed import Observed
from benchmarks.waveclip.table2_embedded import markdown, operating_points, savings
from common.early_exit import NEVER
from common.flops import Macs


def test_a_student_of_two_levels_is_refused():
    cost = Cost(10, Macs(1.0, 1.0, 0.0, {}, 0))
    answers = Observed(torch.rand(2, 5), torch.ones(3, 5, dtype=torch.bool), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 levels"):
        operating_points(answers, answers, cost, [cost] * 3, {})


def saving_line(reference, saved, refined, difference, chosen=True):
    line = {"method": "WaveCLIP", "reference": reference, "saved": saved, "refined": refined}
    return line | {"difference": difference, "thresholds": [0.1 if chosen else NEVER], "chosen": chosen}


def test_block_in_words():
    row = {
        "accuracy": 0.6, "interval": [0.59, 0.61], "against_teacher": [-0.01, -0.02, 0.0], "tokens": 38,
        "gmacs": 0.03, "images_per_second": {"1": 100.0, "64": 900.0}, "speed_ratio": {"1": 0.9, "64": 1.2},
    }  # fmt: skip
    run = {"names": 252, "dtype": "float32", "device": "CPU", "threads": 2, "torch": "2", "test_reads": 3}
    block = {
        "conditions": run,
        "pictures": {"val": 4000, "test": 20656},
        "rows": [
            {"method": "teacher (dense)", "refined": None} | row,
            {"method": "full", "refined": 1.0} | row,
        ],
        "savings": [
            saving_line("teacher", [-0.02] * 3, 1.0, [-0.03, -0.04, -0.02], chosen=False),
            saving_line("WaveCLIP's fine level", [0.7] * 3, 0.0, [0.02, 0.01, 0.03]),
        ],
    }
    text = markdown(json.loads(json.dumps(block)))
    assert "| full | 100.0 % | 60.0 [59.0, 61.0] | -1.0 [-2.0, +0.0] | 38.0 | 0.0300 | 0.0 % |" in text
    assert "| teacher | WaveCLIP | 100.0 % | -2.0 [-2.0, -2.0] | -3.0 [-4.0, -2.0] | no saving shown:" in text
    assert "252 names" in text and "20,656 test pictures" in text and "read 3 times" in text
    assert "One training seed, so no headline is drawn" in text
    assert "refining won nothing" in text
    block["savings"][1] = saving_line("WaveCLIP's fine level", [0.3] * 3, 0.5, [0.0, -0.01, 0.01])
    assert "refining won nothing" not in markdown(block)


def test_a_saving_is_chosen_on_val_and_measured_on_test():
    """A student that is right where it is sure: the half that it is unsure of is refined, and the other half saves."""
    place = torch.arange(1000) / 1000
    right = torch.stack([place >= 0.5, torch.ones(1000, dtype=torch.bool)])
    answers = Observed(place[None], right, right[1])
    first, second = (Cost(tokens, Macs(gmacs, gmacs, 0.0, {}, 0)) for tokens, gmacs in ((10, 0.25), (38, 1.0)))
    lines = savings(answers, answers, [first, second], second, resamples=20)
    assert [line["reference"] for line in lines] == ["teacher", "WaveCLIP's fine level"]
    for line in lines:
        assert line["chosen"] and 0.49 <= line["refined"] <= 0.5
        assert line["saved"][0] == pytest.approx(0.75 * (1 - line["refined"]))

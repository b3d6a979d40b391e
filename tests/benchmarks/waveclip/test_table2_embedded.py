"""The embedded block of Table 2: what it refuses, and its words."""

import json

import pytest
import torch

from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.observed import Observed
from benchmarks.waveclip.table2_embedded import markdown, operating_points
from common.flops import Macs


def test_a_student_of_two_levels_is_refused():
    cost = Cost(10, Macs(1.0, 1.0, 0.0, {}, 0))
    answers = Observed(torch.rand(2, 5), torch.ones(3, 5, dtype=torch.bool), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 levels"):
        operating_points(answers, answers, cost, [cost] * 3, {})


def test_block_in_words():
    row = {
        "accuracy": 0.6, "interval": [0.59, 0.61], "against_teacher": [-0.01, -0.02, 0.0], "tokens": 38,
        "gmacs": 0.03, "images_per_second": {"1": 100.0, "64": 900.0}, "speed_ratio": {"1": 0.9, "64": 1.2},
    }  # fmt: skip
    run = {
        "names": 1291,
        "rule": "a rule",
        "dtype": "float32",
        "device": "CPU",
        "threads": 2,
        "torch": "2",
    }
    block = {
        "conditions": run,
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

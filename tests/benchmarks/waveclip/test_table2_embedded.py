"""The embedded block of Table 2: what it refuses, its rows and savings by hand, and its words."""

import json

import pytest
import torch

from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.observed import Observed
from benchmarks.waveclip.table2_embedded import markdown, operating_points, savings
from common.early_exit import NEVER
from common.flops import Macs

COARSE, FINE = Cost(10, Macs(0.25, 0.2, 0.0, {}, 0)), Cost(38, Macs(1.0, 0.8, 0.0, {}, 0))


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
    """A student that is right where it is sure, and a teacher that is right where its coarse level is.

    At the teacher's accuracy nothing is refined; at its fine level's the half that is unsure on val. On test margins
    are squared, so that more of them, a share of about 0.5 ** 0.5, are below the threshold.
    """
    place = torch.arange(1000) / 1000
    right = torch.stack([place >= 0.5, torch.ones(1000, dtype=torch.bool)])
    val, test = (Observed(margin[None], right, right[0]) for margin in (place, place**2))
    lines = savings(val, test, [COARSE, FINE], FINE, resamples=20)
    assert [line["reference"] for line in lines] == ["teacher", "WaveCLIP's fine level"]
    for line, refined in zip(lines, (0, 0.5**0.5), strict=True):
        assert line["chosen"] and line["refined"] == pytest.approx(refined, abs=0.01)
        assert line["saved"][0] == pytest.approx(0.75 * (1 - line["refined"]))


def test_an_operating_point_has_its_share_on_val_and_its_numbers_on_test():
    val = Observed(torch.arange(10)[None] / 10, torch.ones(2, 10, dtype=torch.bool), torch.ones(10, dtype=torch.bool))
    # Two fifths of val are below 0.35, and four of these five.
    margin = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.9]])
    correct = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 0, 1, 0]]).bool()
    test = Observed(margin, correct, teacher=torch.tensor([1, 0, 0, 0, 0]).bool())
    dense, _, row, _ = operating_points(val, test, FINE, [COARSE, FINE], {"balanced": 0.4})
    assert dense["accuracy"] == pytest.approx(1 / 5) and dense["gmacs"] == 1
    assert row["method"] == "WaveCLIP balanced" and row["threshold"] == pytest.approx(0.35)
    assert row["refined"] == pytest.approx(4 / 5) and row["accuracy"] == pytest.approx(4 / 5)
    assert row["against_teacher"][0] == pytest.approx(4 / 5 - 1 / 5)
    assert row["tokens"] == pytest.approx(10 / 5 + 38 * 4 / 5)
    assert (row["gmacs"], row["gmacs_paper"]) == pytest.approx((0.25 / 5 + 4 / 5, 0.2 / 5 + 0.8 * 4 / 5))

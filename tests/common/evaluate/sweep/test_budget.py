"""What a budget refuses, from records alone."""

import pytest

from common.evaluate.points import Point
from common.evaluate.sweep.budget import best_within, check_budget
from common.evaluate.sweep.measure import WHOLE


def test_a_resumed_sweep_says_why_no_cost_is_known():
    known = {WHOLE: {"gmacs": None, "uncounted": "no cost is known for x"}}
    with pytest.raises(ValueError, match="--budget 1: this model's cost is not known: no cost is known for x"):
        check_budget(None, [WHOLE], known, 1.0)


def test_thresholds_that_cost_more_on_these_pictures_are_refused():
    records = {WHOLE: {"gmacs": 2.0, "top1": 1.0}, Point(threshold=0.5): {"gmacs": 1.5, "top1": 0.9}}
    with pytest.raises(ValueError, match=r"--budget 1: the cheapest of 2 settings costs 1\.5 GMACs a picture"):
        best_within(records, 1.0, "top1")

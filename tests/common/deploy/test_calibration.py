"""Thresholds for budgets and targets against brute force, and intervals that hold what they promise."""

import json
import math

import numpy as np
import pytest

from common.deploy.calibration import Calibration, Outcomes, Point, Wish, choose, least_correct, thinned
from common.early_exit import NEVER
from common.evaluate.accuracy import wilson_interval


def outcomes(pictures, levels, seed=0, ties=False):
    """Random outcomes: later levels are right more often, and confidence says a little about it."""
    random = np.random.default_rng(seed)
    correct = random.random((pictures, levels + 1)) < np.linspace(0.4, 0.8, levels + 1)
    confidence = 0.3 * correct[:, :-1] + 0.7 * random.random((pictures, levels))
    costs = np.cumsum(random.uniform(1, 3, levels + 1))
    return Outcomes(costs, correct, confidence.round(1) if ties else confidence)


def played(of, threshold):
    """Mean cost and accuracy when every picture is led through the levels by hand."""
    cost = right = 0.0
    for confidence, correct in zip(of.confidence, of.correct, strict=True):
        level = next((n for n, sure in enumerate(confidence) if sure >= threshold), len(confidence))
        cost, right = cost + of.costs[level], right + correct[level]
    return cost / len(of.correct), right / len(of.correct)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_curve_is_what_every_threshold_gives(levels, ties):
    of = outcomes(60, levels, ties=ties)
    settings, (gmacs, accuracy) = of.settings(), of.curve()
    assert settings[0] == 0 and settings[-1] == NEVER and (np.diff(settings) > 0).all()
    for setting, *found in zip(settings, gmacs, accuracy, strict=True):
        assert found == pytest.approx(played(of, setting))
    for threshold in np.linspace(0, 1, 40):
        assert abs(gmacs - played(of, threshold)[0]).min() < 1e-9, "no other costs exist"


def test_weights_count_pictures_several_times():
    of = outcomes(30, 2)
    times = np.random.default_rng(1).integers(0, 4, 30)
    repeated = Outcomes(of.costs, of.correct.repeat(times, axis=0), of.confidence.repeat(times, axis=0))
    weighted = dict(zip(of.settings(), zip(*of.curve(times), strict=True), strict=True))
    for setting, (gmacs, accuracy) in weighted.items():
        assert (gmacs, accuracy) == pytest.approx(played(repeated, setting))


def test_a_budget_is_used_as_far_as_it_goes():
    of = outcomes(200, 1)
    for gmacs in np.linspace(of.costs[0], of.costs[1], 7):
        point = choose(of, Wish(gmacs=gmacs), resamples=10)
        assert point.gmacs <= gmacs + 1e-6 and point.gmacs == pytest.approx(played(of, point.setting)[0])
        one_more = (of.costs[1] - of.costs[0]) / 200
        assert point.gmacs > gmacs - one_more - 1e-6
    with pytest.raises(ValueError, match=r"the cheapest path costs .* give that or more"):
        choose(of, Wish(gmacs=of.costs[0] / 2))


def test_a_target_is_reached_by_the_lower_end_and_no_dearer_than_needed():
    of = outcomes(400, 2)
    point = choose(of, Wish(accuracy=0.6), resamples=10)
    assert wilson_interval(round(point.accuracy * 400), 400)[0] >= 0.6
    for setting in of.settings()[of.settings() < point.setting]:
        right = played(of, setting)[1]
        assert wilson_interval(round(right * 400), 400)[0] < 0.6
    with pytest.raises(ValueError, match=r"the best setting has 0\.\d+ on 400 pictures, whose interval begins at"):
        choose(of, Wish(accuracy=0.97))


def test_paths_for_all_pictures():
    random = np.random.default_rng(0)
    correct = random.random((500, 3)) < [0.3, 0.6, 0.7]
    of = Outcomes(np.array([1.0, 2.0, 4.0]), correct, paths=(0.3, 0.6, 1.0))
    assert choose(of, Wish(gmacs=3.9)).setting == 0.6
    point = choose(of, Wish(accuracy=0.5))
    assert (point.setting, point.gmacs) == (0.6, 2.0)
    low, high = point.accuracy_interval
    assert low < correct[:, 1].mean() < high and point.gmacs_interval[0] <= 2.0 <= point.gmacs_interval[1]


@pytest.mark.parametrize("levels", [1, 2])
def test_new_pictures_land_within_the_interval_as_often_as_it_says(levels):
    landed = {"gmacs": 0, "accuracy": 0}
    for seed in range(100):
        both = outcomes(400, levels, seed)
        old, new = (Outcomes(np.arange(1, levels + 2), both.correct[half], both.confidence[half]) for half in HALVES)
        point = choose(old, Wish(gmacs=1.6), resamples=200, seed=seed)
        gmacs, accuracy = played(new, point.setting)
        landed["gmacs"] += point.gmacs_interval[0] <= gmacs <= point.gmacs_interval[1]
        landed["accuracy"] += point.accuracy_interval[0] <= accuracy <= point.accuracy_interval[1]
    for name, times in landed.items():
        low, high = wilson_interval(times, 100, 0.999)
        assert low <= 0.95 <= high, f"{name}: {times} of 100 within a 95 % interval"


HALVES = (slice(0, 200), slice(200, 400))


@pytest.mark.parametrize("total", [1, 10, 333])
def test_the_least_number_of_right_answers(total):
    for target in (0.05, 0.5, 0.77):
        enough = [n for n in range(total + 1) if wilson_interval(n, total)[0] >= target]
        assert least_correct(target, total) == (enough[0] if enough else total + 1)


def test_a_wish_is_one_thing():
    for wrong in ({}, {"gmacs": 1.0, "accuracy": 0.5}, {"accuracy": 60.0}):
        with pytest.raises(ValueError, match=r"one of them|must be a fraction"):
            Wish(**wrong)


def test_a_calibration_on_disk(tmp_path):
    of = outcomes(1000, 1)
    point = choose(of, Wish(gmacs=2.0), resamples=20)
    curve = thinned(of)
    assert len(curve) == 200 and curve[0][0] == 0 and curve[-1][0] == NEVER
    made = Calibration("threshold", {"gmacs": 2.0}, point, curve, 1000, list(of.costs), {"image": "a"}, "b", {})
    made.write(tmp_path / "folder" / "calibration.json")
    read = Calibration.read(tmp_path / "folder" / "calibration.json")
    assert read == made and isinstance(read.point, Point)
    assert read.within(2.0) == point.setting
    for budget in (of.costs[0], 2.5, of.costs[1], 99.0):
        setting = read.within(budget)
        assert played(of, setting)[0] <= budget + 1e-6
    assert read.within(99.0) == NEVER
    with pytest.raises(ValueError, match="the cheapest path costs"):
        read.within(of.costs[0] / 2)
    written = json.loads((tmp_path / "folder" / "calibration.json").read_text())
    by_hand = [{"point": {**written["point"], "setting": "0.3"}}, {"conditions": None}, {"curve": [["0.3", 1.0, 0.5]]}]
    by_hand = [json.dumps(written | change) for change in by_hand]
    for text in ("{}", "[1]", "no json", json.dumps({"point": {"x": 1}}), *by_hand):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json is no calibration"):
            Calibration.read(tmp_path / "wrong.json")


def test_a_budget_is_a_number_above_0():
    for gmacs in (math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match="must be a number above 0"):
            Wish(gmacs=gmacs)

"""One threshold for several data sets: what it loses, gate by gate, on answers whose confidences are known."""

import numpy as np
import pytest

from benchmarks.waveclip import gates
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.gates import at_shares, common_threshold, missing, render
from waveclip import margin_threshold

PLACE = np.linspace(0.001, 0.999, 400)


def splits(margin, maximum):
    """Answers on val and test that are alike: the fine level is always right, the coarse one where it is sure."""
    correct = np.stack([PLACE > 0.5, np.ones(len(PLACE), dtype=bool)])
    given = Answers(correct, margin[None], maximum[None])
    return {"val": given, "test": given}


def test_each_set_has_the_same_weight_however_many_pictures_it_has():
    small, large = np.array([0.1, 0.2, 0.3, 0.4]), np.linspace(0.5, 0.9, 1000)
    assert common_threshold([small, large], 0.25) == pytest.approx(0.3)
    assert (large < common_threshold([small, large], 0.75)).mean() == pytest.approx(0.5, abs=0.01)


def test_one_threshold_loses_nothing_where_the_sets_are_alike():
    found = {"CIFAR-10": [splits(PLACE, PLACE)], "Fashion-MNIST": [splits(PLACE, PLACE)]}
    compared = at_shares(found, 20)
    assert [at["share"] for at in compared] == list(gates.SHARES)
    for at in compared:
        assert all(row["difference"] == (0, 0, 0) for row in at["rows"])
        assert all(row["refined"] == pytest.approx(at["share"], abs=0.01) for row in at["rows"])


def test_thresholds_are_those_of_val():
    """On test the pictures are less sure: what refines a share of val refines the share's square root there."""
    less_sure = {"val": splits(PLACE, PLACE)["val"], "test": splits(PLACE**2, PLACE**2)["test"]}
    for at in at_shares({"CIFAR-10": [less_sure], "Fashion-MNIST": [less_sure]}, 20):
        for row in at["rows"]:
            assert (row["refined"], row["own"]) == pytest.approx((at["share"] ** 0.5,) * 2, abs=0.01)


def test_a_gate_whose_scale_differs_between_sets_loses_and_the_margin_leads():
    """The maximum probability of one set lies above all of the other's, so one threshold refines one set alone."""
    found = {
        "CIFAR-10": [splits(PLACE, 0.5 + PLACE / 2) for _ in range(3)],
        "scenes of shape": [splits(PLACE, PLACE / 2) for _ in range(3)],
    }
    (at,) = [at for at in at_shares(found, 50) if at["share"] == 0.558]
    refined = {(row["gate"], row["data"]): row["refined"] for row in at["rows"]}
    assert refined["maximum probability", "scenes of shape"] == 1
    assert refined["maximum probability", "CIFAR-10"] == pytest.approx(2 * 0.558 - 1, abs=0.01)
    # Each set's own threshold refines all that is wrong; the common one leaves most of CIFAR-10's as it is.
    gained, moved = (at["means"][measure] for measure in ("gained", "moved"))
    assert gained["maximum probability"][0] == pytest.approx((2 * 0.558 - 1 - 0.5) / 2, abs=0.01)
    assert moved["maximum probability"][0] == pytest.approx(1 - 0.558, abs=0.01), "of each set, in opposite directions"
    assert gained["margin"] == moved["margin"] == (0, 0, 0)
    for measure in ("gained", "moved"):
        lead = at["leads"][measure]["maximum probability"]
        assert lead["difference"][1] > 0.1 and lead["p"] < 0.5


def test_a_gate_that_gains_by_refining_few_of_a_set_is_not_the_more_stable_one():
    """Refining is wrong on one set; the gate that leaves that set alone wins accuracy, and moves every share."""
    worse = splits(PLACE, PLACE / 10 + 0.9)
    worse["val"].correct[:] = worse["val"].correct[::-1].copy()  # test's are the same
    found = {"CIFAR-10": [splits(PLACE, PLACE)] * 3, "scenes of shape": [worse] * 3}
    (at,) = [at for at in at_shares(found, 50) if at["share"] == 0.264]
    leads = {measure: at["leads"][measure]["maximum probability"]["difference"][0] for measure in gates.MEASURES}
    assert leads["gained"] < 0 < leads["moved"]


def test_refining_every_picture_gains_where_the_fine_level_is_better():
    found = {"CIFAR-10": 3 * [splits(PLACE, PLACE)], "Fashion-MNIST": 3 * [splits(PLACE, PLACE)]}
    correct = found["Fashion-MNIST"][0]["test"].correct
    correct[0] = correct[-1]  # all levels are right there
    better, equal = gates.refining_gains(found, 50)
    assert better["gain"][0] == pytest.approx(0.5) and better["p"] < 0.001
    assert equal["gain"] == (0, 0, 0) and equal["p"] == 1


def test_a_threshold_relative_to_the_number_of_classes_is_one_of_the_gates():
    given = splits(PLACE, PLACE)["val"]
    relative, classes = 20.0, 252
    exits = gates.GATES["margin × classes"](given, classes) >= relative
    assert (exits == (given.margin[0] >= margin_threshold(relative, classes))).all() and 0 < exits.mean() < 1


def test_pictures_of_equal_confidence_go_together_and_the_row_says_how_many():
    """Half of the pictures are as sure as can be: no threshold refines three quarters."""
    sure = np.where(PLACE > 0.5, 1.0, PLACE)
    found = {"CIFAR-10": [splits(sure, sure)], "Fashion-MNIST": [splits(sure, sure)]}
    (at,) = [at for at in at_shares(found, 20) if at["share"] == 0.743]
    assert {row["own"] for row in at["rows"]} == {row["refined"] for row in at["rows"]} == {0.5}


def test_chance_is_zero_and_certainty_one_for_any_number_of_classes():
    above = gates.GATES["maximum probability above chance"]
    for classes in (2, 252):
        given = Answers(np.ones((2, 2), dtype=bool), np.zeros((1, 2)), np.array([[1 / classes, 1.0]]))
        assert above(given, classes).tolist() == pytest.approx([0, 1])


def test_what_lacks_is_named_and_the_table_says_what_was_run(monkeypatch):
    found = {"CIFAR-10": [splits(PLACE, PLACE)], "Fashion-MNIST": [splits(PLACE, PLACE)]}
    monkeypatch.setattr(gates, "known", lambda: {"CIFAR-10": found["CIFAR-10"]})
    assert "needs two data sets" in render(gates.run(smoke=True))["md"]
    monkeypatch.setattr(gates, "known", lambda: found)
    result = gates.run(smoke=True)
    assert [what for what, _ in missing(result)] == [
        "3 of 3 WaveCLIPs on scenes of shape", "2 of 3 WaveCLIPs on CIFAR-10", "2 of 3 WaveCLIPs on Fashion-MNIST"
    ]  # fmt: skip
    text = render(result)["md"]
    assert "| 14.8 % | margin | +0.0 [+0.0, +0.0] (15 %, 15 %) |" in text and "One training seed" in text

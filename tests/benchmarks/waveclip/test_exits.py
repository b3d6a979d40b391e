"""Thresholds, frontier, separation and the headline's rule, against brute force on a few pictures."""

import pytest
import torch

from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.exits import Outcomes, frontier, headline, headline_lines, separation
from common.deploy.early_exit import threshold_for
from common.flops import Macs


def cost(gmacs: float, tokens: int) -> Cost:
    return Cost(tokens, Macs(gmacs, gmacs, 0.0, {}, 0))


COSTS = [cost(0.25, 10), cost(1.0, 38)]


def pictures(total: int, coarse: float, fine: float, teacher: float) -> Outcomes:
    """Outcomes with these accuracies; the surer half of the pictures is where coarse is right most often."""
    margin = torch.arange(total) / total
    place = margin.flip(0)  # the least sure pictures are the last to be right
    right = [place < share for share in (coarse, fine, teacher)]
    return Outcomes(margin, margin, *right, right[0] == right[1])


def test_frontier_is_the_accuracy_behind_every_threshold():
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(40, generator=generator)
    coarse, fine = (torch.rand(40, generator=generator) < 0.5 for _ in range(2))
    shares, accuracy = frontier(confidence, coarse, fine, points=41)
    for share, found in zip(shares, accuracy, strict=True):
        refined = confidence < threshold_for(confidence, share)
        assert found == pytest.approx(torch.where(refined, fine, coarse).float().mean().item())
    assert accuracy[0] == pytest.approx(coarse.float().mean().item())
    assert accuracy[-1] == pytest.approx(fine.float().mean().item())


def test_separation_counts_ordered_pairs():
    confidence = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9])
    outcome = torch.tensor([False, True, False, False, True])
    pairs = [(a, b) for a in confidence[outcome].tolist() for b in confidence[~outcome].tolist()]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert separation(confidence, outcome) == pytest.approx(expected)


def test_an_operating_point_is_a_threshold_on_the_margin():
    of = pictures(10, 0.5, 0.8, 0.8)
    correct, refined = of.at(0.35)
    assert refined == pytest.approx(0.4)
    assert correct.tolist() == [*of.fine[:4].tolist(), *of.coarse[4:].tolist()]


def test_headline_chosen_on_val_and_said_by_test():
    of = pictures(4000, 0.5, 0.8, 0.81)
    found = headline(of, of, COSTS, dense=1.0)
    assert found["reasons"] == []
    student, teacher = found["goals"]
    # Fine is right on the surest 80 %, coarse on the surest 50 %: refining the less sure half gives all that
    # there is to gain, and only 0.5 points of it may be left.
    assert student["reached"] and 0.48 <= student["refined"] <= 0.51
    assert student["gmacs"] == pytest.approx(0.25 + 0.75 * student["refined"])
    assert student["saved"] == pytest.approx(1 - student["gmacs"])
    assert teacher == {"reference": "teacher", "allowance": 0.002, "reached": False, "threshold": None}
    lines = headline_lines(found)
    assert "GMACs saved" in lines[0] and "reached" in lines[0]
    assert "not reached by any threshold" in lines[1]


def test_a_threshold_that_val_liked_may_fail_on_test():
    val, test = pictures(4000, 0.79, 0.8, 0.8), pictures(4000, 0.5, 0.8, 0.8)
    found = headline(val, test, COSTS, dense=1.0)
    assert not found["goals"][0]["reached"]
    assert "NOT reached on test" in headline_lines(found)[0]


@pytest.mark.parametrize(
    ("coarse", "fine", "teacher", "reason"),
    [(0.78, 0.8, 0.81, "not clearly 5 above"), (0.5, 0.7, 0.8, "not clearly within 3")],
)
def test_no_headline_without_a_student_that_earns_one(coarse, fine, teacher, reason):
    of = pictures(4000, coarse, fine, teacher)
    found = headline(of, of, COSTS, dense=1.0)
    assert found["goals"] == []
    (line,) = headline_lines(found)
    assert line.startswith("No headline") and reason in line

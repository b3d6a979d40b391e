"""Curves and separation, against brute force on a few images."""

import pytest
import torch

from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.exits import curve_by_share, curve_by_threshold, separation
from benchmarks.waveclip.observed import Observed
from common.early_exit import threshold_for
from common.flops import Macs


def costs(*gmacs: float) -> list[Cost]:
    return [Cost(value, Macs(value, value, 0.0, {}, 0)) for value in gmacs]


def answers_with(total: int, coarse: float, fine: float, teacher: float) -> Observed:
    """Answers with these accuracies; the more confident half of the images is where coarse is right most often."""
    margin = torch.arange(total) / total
    place = margin.flip(0)  # the least confident images are the last to be right
    right = [place < share for share in (coarse, fine, teacher)]
    return Observed(margin[None], torch.stack(right[:2]), right[2])


def random_answers(levels: int, total: int = 60) -> Observed:
    generator = torch.Generator().manual_seed(levels)
    right = torch.rand(levels + 1, total, generator=generator) < 0.5
    return Observed(torch.rand(levels - 1, total, generator=generator), right[1:], right[0])


def test_curve_by_share_is_the_accuracy_behind_every_threshold():
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(40, generator=generator)
    coarse, fine = (torch.rand(40, generator=generator) < 0.5 for _ in range(2))
    shares, accuracies = curve_by_share(confidence, coarse, fine, 41)
    for share, accuracy in zip(shares, accuracies, strict=True):
        refined = confidence < threshold_for(confidence, share)
        assert accuracy == pytest.approx(torch.where(refined, fine, coarse).float().mean().item())
    assert accuracies[0] == pytest.approx(coarse.float().mean().item())
    assert accuracies[-1] == pytest.approx(fine.float().mean().item())


def test_with_one_level_to_refine_both_curves_are_one():
    answers = random_answers(2)
    curve = curve_by_threshold(answers, costs(1.0, 3.0), 31)
    shares, accuracies = curve_by_share(answers.margin[0], answers.coarse, answers.fine, 31)
    assert [point["shares"][1] for point in curve] == pytest.approx(shares)
    assert [point["accuracy"] for point in curve] == pytest.approx(accuracies)
    assert [point["gmacs"] for point in curve] == pytest.approx([1 + 2 * share for share in shares])


def test_curve_by_threshold_goes_from_the_first_level_alone_to_the_last():
    answers = random_answers(4)
    curve = curve_by_threshold(answers, costs(1.0, 2.0, 4.0, 8.0))
    assert curve[0]["shares"] == [1, 0, 0, 0] and curve[-1]["shares"] == [0, 0, 0, 1]
    for point, correct in ((curve[0], answers.coarse), (curve[-1], answers.fine)):
        assert point["accuracy"] == pytest.approx(correct.double().mean().item())
    gmacs = [point["gmacs"] for point in curve]
    assert gmacs == sorted(gmacs) and gmacs[0] == 1.0 and gmacs[-1] == 8.0


def test_separation_counts_ordered_pairs():
    confidence = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9])
    outcome = torch.tensor([False, True, False, False, True])
    pairs = [(a, b) for a in confidence[outcome].tolist() for b in confidence[~outcome].tolist()]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert separation(confidence, outcome) == pytest.approx(expected)


def test_an_operating_point_is_a_threshold_on_the_margin():
    answers = answers_with(10, 0.5, 0.8, 0.8)
    correct, shares = answers.at(0.35)
    assert shares == pytest.approx([0.6, 0.4])
    assert correct.tolist() == [*answers.fine[:4].tolist(), *answers.coarse[4:].tolist()]

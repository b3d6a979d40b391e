"""Early exit on recorded confidences: thresholds, exits and means, against images led by hand."""

import numpy as np
import pytest
import torch

from common.early_exit import NEVER, ThresholdSweep, exit_at, threshold_for


@pytest.mark.parametrize("share", [0.0, 0.148, 0.5, 0.743, 1.0])
def test_threshold_lets_exactly_the_share_through(share):
    confidence = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    refined = confidence < threshold_for(confidence, share)
    assert int(refined.sum()) == round(share * 1000)
    assert threshold_for(confidence, 0.0) == 0.0 and threshold_for(confidence, 1.0) == NEVER


def test_neighbouring_numbers_are_told_apart():
    below = torch.tensor(0.5)
    confidence = torch.stack([below, torch.nextafter(below, torch.tensor(1.0))])
    assert (confidence < threshold_for(confidence, 0.5)).tolist() == [True, False]


def test_equal_confidences_at_the_place_are_all_answered():
    confidence = torch.tensor([0.1, 0.5, 0.5, 0.9])
    assert (confidence < threshold_for(confidence, 0.5)).tolist() == [True, False, False, False]


def test_a_share_is_a_fraction():
    with pytest.raises(ValueError, match=r"share 1\.2 must be a fraction"):
        threshold_for(torch.rand(3), 1.2)


def test_an_image_exits_at_the_first_level_that_reaches_the_threshold():
    confidence = torch.tensor([[0.9, 0.1, 0.1, 0.5], [0.1, 0.9, 0.2, 0.9]])
    correct = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    right, shares = exit_at(0.5, confidence, correct)
    assert right.tolist() == [True] * 4, "a tie stops"
    assert shares == [0.5, 0.25, 0.25]
    assert exit_at(NEVER, confidence, correct)[1] == [0, 0, 1]


def test_a_sweep_is_every_threshold_in_turn():
    random = np.random.default_rng(0)
    confidence, values = random.random((30, 2)).round(1), random.random((30, 3))
    sweep = ThresholdSweep(confidence)
    for threshold, gain in zip(sweep.thresholds, sweep.gain(values, np.ones(30)), strict=True):
        exits = [next((n for n, sure in enumerate(row) if sure >= threshold), 2) for row in confidence]
        assert gain == pytest.approx(np.mean(values[range(30), exits] - values[:, 0]))

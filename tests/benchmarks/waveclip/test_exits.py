"""What a gate refines and how well it separates, against brute force on a few images."""

import numpy as np
import pytest
import torch

from benchmarks.waveclip.exits import least_confident_refined, over_all_shares, refined_by_share, separation
from benchmarks.waveclip.saving import Exits
from common.early_exit import threshold_for


def random_exits(total=40, seed=1):
    rng = np.random.default_rng(seed)
    first, second, reference = rng.random((3, total)) < 0.5
    return Exits(rng.random(total), first, second, reference)


def test_the_least_confident_images_are_those_below_a_threshold():
    seeds = [random_exits(seed=1), random_exits(seed=2)]
    for share in (0.0, 0.1, 0.325, 1.0):
        correct, refined = least_confident_refined(seeds, share)
        assert refined == round(40 * share) / 40
        for row, exits in zip(correct, seeds, strict=True):
            late = exits.confidence < threshold_for(torch.from_numpy(exits.confidence), share)
            assert (row == np.where(late, exits.second, exits.first)).all()


def test_images_of_equal_confidence_are_refined_in_their_order():
    exits = Exits(np.zeros(4), np.zeros(4, bool), np.ones(4, bool), np.zeros(4, bool))
    assert least_confident_refined([exits], 0.5)[0].tolist() == [[True, True, False, False]]


def test_the_mean_over_all_shares_is_that_of_every_operating_point():
    exits = random_exits()
    every = [least_confident_refined([exits], refined / 40)[0].mean() for refined in range(41)]
    assert over_all_shares(exits).mean() == pytest.approx(np.mean(every))


def test_each_seed_refines_by_its_own_threshold_of_val():
    val, seen = ([random_exits(seed=seed) for seed in seeds] for seeds in ((1, 2), (3, 4)))
    refined = refined_by_share(val, seen, 0.25)
    for row, threshold, chosen_on, exits in zip(refined.correct, refined.thresholds, val, seen, strict=True):
        assert (chosen_on.confidence < threshold).sum() == 10
        assert (row == np.where(exits.confidence < threshold, exits.second, exits.first)).all()
    assert refined.share == pytest.approx(
        np.mean([exits.confidence < threshold for exits, threshold in zip(seen, refined.thresholds, strict=True)])
    )


CONFIDENCE, OUTCOME = np.array([0.1, 0.4, 0.4, 0.8, 0.9]), np.array([False, True, False, False, True])


def test_separation_counts_ordered_pairs():
    pairs = [(a, b) for a in CONFIDENCE[OUTCOME] for b in CONFIDENCE[~OUTCOME]]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert separation(CONFIDENCE, OUTCOME).mean() == pytest.approx(expected)


def test_separation_has_delongs_variance():
    exits = random_exits(200)
    confidence, outcome = exits.confidence, exits.first
    above = np.array([(a > confidence[~outcome]).mean() for a in confidence[outcome]])
    below = np.array([(a < confidence[outcome]).mean() for a in confidence[~outcome]])
    expected = above.var() / len(above) + below.var() / len(below)
    assert separation(confidence, outcome).var() / 200 == pytest.approx(expected)


@pytest.mark.parametrize("value", [True, False])
def test_separation_needs_both_kinds(value):
    with pytest.raises(ValueError, match=f"{5 * value} of 5 images have the outcome"):
        separation(CONFIDENCE, np.full(5, value))

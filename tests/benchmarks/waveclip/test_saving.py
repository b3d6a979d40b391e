"""The saving of early exit: the threshold's rule by brute force, and an interval that widens with few val pictures."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.waveclip.saving import Exits, saving


def classifier(pictures, seed, spoilt=0.03):
    """A first step, 60 % right and surer where it is; a second, 80 % right; a reference: the second, some spoilt."""
    rng = np.random.default_rng(seed)
    first = rng.random(pictures) < 0.6
    second = first | (rng.random(pictures) < 0.5)
    return Exits(rng.random(pictures) * 0.5 + 0.5 * first, first, second, second & (rng.random(pictures) >= spoilt))


def lower_end(difference):
    return difference.mean() - 1.959964 * difference.std() / len(difference) ** 0.5


def test_the_threshold_is_the_cheapest_whose_interval_on_val_stays_above_the_allowance():
    val, test = classifier(2000, 0), classifier(2000, 1)
    (threshold,) = saving([val], [test], (1.0, 4.0), 4.0, allowance=0.01, resamples=10).thresholds

    def sufficient(value):
        refined = val.confidence < value
        answers = np.where(refined, val.second, val.first).astype(float) - val.reference
        return lower_end(answers) >= -0.01

    cheaper = np.quantile(val.confidence, np.linspace(0, 1, 101))
    assert sufficient(threshold)
    assert not any(sufficient(value) for value in cheaper[cheaper < threshold - 0.02])


def test_pictures_of_equal_confidence_are_refined_together():
    """4,000 of 10,000 pictures tie, and the first step is wrong on all of them: some of them will not do."""
    confidence = np.where(np.arange(10_000) < 4000, 0.3, 0.9).astype(np.float32)
    first, right = confidence > 0.5, np.ones(10_000, bool)
    exits = Exits(confidence, first, right, right)
    result = saving([exits], [exits], (1.0, 4.0), 4.0, allowance=0.1, resamples=20)
    assert result.chosen and result.refined == (0.4,) and result.difference.middle == 0


def test_the_saving_is_that_of_the_refined_share_on_test():
    result = saving([classifier(2000, 0)], [classifier(3000, 1)], (1.0, 4.0), 5.0, resamples=50)
    (refined,) = result.refined
    assert result.saved.middle == pytest.approx(1 - (1 + 3 * refined) / 5)
    assert result.saved.low <= result.saved.middle <= result.saved.high and result.chosen


def test_few_val_pictures_make_the_saving_uncertain():
    test = classifier(4000, 9)
    widths = []
    for pictures in (500, 20_000):
        saved = saving([classifier(pictures, 3)], [test], (1.0, 4.0), 4.0, allowance=0.02, resamples=100).saved
        widths.append(saved.high - saved.low)
    assert widths[0] > 2 * widths[1]


def test_a_reference_out_of_reach_refines_all_and_says_so():
    exits = replace(classifier(1000, 0), reference=np.ones(1000, bool))
    result = saving([exits], [exits], (1.0, 4.0), 4.0, resamples=20)
    assert not result.chosen and result.refined == (1.0,)
    assert result.saved.middle == pytest.approx(0)


def test_each_training_seed_has_its_own_threshold():
    seeds = [classifier(1000, number) for number in range(3)]
    result = saving(seeds, seeds, (1.0, 4.0), 4.0, resamples=50)
    assert len(set(result.thresholds)) == 3 and result.saved.seeds == 3


def test_two_savings_of_the_same_pictures_are_compared_resample_by_resample():
    val, test = classifier(1000, 0), classifier(1000, 1)
    first, second = (saving([val], [test], costs, 4.0, resamples=50) for costs in ((1.0, 4.0), (1.5, 4.5)))
    difference = first.less(second)
    assert difference.middle == pytest.approx(0.5 / 4), "the same choices, each half a unit cheaper"
    assert (difference.low, difference.high) == (pytest.approx(0.125), pytest.approx(0.125))

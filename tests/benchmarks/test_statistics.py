"""Intervals over training seeds and pictures, against closed formulas and by simulation."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics import (
    adjusted_p,
    difference,
    holm,
    mean_interval,
    mean_over_sets,
    median_interval,
    share_interval,
)


def drawn(seeds, pictures, spread, rng):
    """Right answers of models whose accuracy varies about 0.7 by ``spread`` between training seeds: bool [S,M]."""
    accuracy = 0.7 + spread * rng.standard_normal(seeds)
    return rng.random((seeds, pictures)) < accuracy[:, None]


def test_one_seeds_interval_is_that_of_a_proportion():
    right = np.arange(1000)[None] < 700
    interval = mean_interval(right, resamples=4000)
    half = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert interval.middle == pytest.approx(0.7) and interval.seeds == 1
    assert interval.low == pytest.approx(0.7 - half, abs=2e-3) and interval.high == pytest.approx(0.7 + half, abs=2e-3)


def test_a_shares_interval_is_that_of_its_drawn_pictures():
    interval = mean_interval(np.arange(1000)[None] < 700, resamples=4000)
    assert share_interval(700, 1000, resamples=4000) == pytest.approx((interval.low, interval.high), abs=3e-3)
    assert share_interval(5, 5) == (1, 1)
    with pytest.raises(ValueError, match="an accuracy of no pictures"):
        share_interval(0, 0)


def test_the_spread_between_seeds_widens_the_interval_as_the_variance_of_a_mean_does():
    """Three constant seeds: resampled S - 1 = 2 at a time, the variance of the mean is the unbiased s² / 3."""
    values = np.array([[0.6], [0.7], [0.8]]) * np.ones((3, 50))
    interval = mean_interval(values, resamples=4000)
    assert (interval.low, interval.high) == pytest.approx((0.6, 0.8), abs=1e-6)
    drawn_pairs = [(a + b) / 2 for a in (0.6, 0.7, 0.8) for b in (0.6, 0.7, 0.8)]
    assert np.var(drawn_pairs) == pytest.approx(np.var([0.6, 0.7, 0.8], ddof=1) / 3)


def test_models_that_answer_alike_differ_by_nothing():
    right = drawn(3, 500, 0.02, np.random.default_rng(0))
    interval = difference(right, right, paired_seeds=True)
    assert interval.ends == (0, 0, 0) and adjusted_p({"": interval}) == {"": 1}


def test_pairing_by_picture_removes_what_the_pictures_share():
    """One model is the other with 2 % of its answers spoilt: the paired interval is far narrower than either's own."""
    rng = np.random.default_rng(0)
    first = rng.random((1, 5000)) < 0.7
    second = first & (rng.random((1, 5000)) >= 0.02)
    paired, alone = difference(first, second), mean_interval(first)
    assert paired.high - paired.low < 0.4 * (alone.high - alone.low)
    assert paired.low > 0 and adjusted_p({"": paired})[""] < 0.01


def test_about_95_of_100_intervals_of_one_seed_hold_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for number in range(200):
        interval = mean_interval(rng.random((1, 400)) < 0.7, resamples=400, seed=number)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


def test_with_two_seeds_a_difference_is_drawn_from_one_each_time():
    first, second = np.ones((2, 40)), np.stack([np.zeros(40), np.ones(40)])
    interval = difference(first, second)
    assert interval.ends == (0.5, 0, 1)


def test_the_p_of_one_training_is_that_of_a_paired_t_test_over_pictures():
    rng = np.random.default_rng(0)
    first, second = (rng.random((1, 3000)) < accuracy for accuracy in (0.72, 0.7))
    expected = stats.ttest_rel(*(right[0].astype(float) for right in (first, second))).pvalue
    assert adjusted_p({"": difference(first, second)})[""] == pytest.approx(expected, rel=1e-2)


def test_the_p_of_trainings_that_agree_on_all_pictures_is_welchs_t_test_over_them():
    first, second = (np.array(means)[:, None] * np.ones((1, 50)) for means in ([0.7, 0.72, 0.71], [0.68, 0.69, 0.7]))
    gap = difference(first, second)
    expected = stats.ttest_ind(first[:, 0], second[:, 0]).pvalue  # equal variances: 2 + 2 degrees of freedom
    assert adjusted_p({"": gap})[""] == pytest.approx(expected, rel=1e-4)


def test_a_table_without_a_true_difference_seldom_shows_one_whatever_the_spread_between_trainings():
    """14 comparisons of three trainings, with no spread, with as much as the pictures' and with five times that."""
    rng, nothing = np.random.default_rng(0), np.zeros((3, 200))
    for spread in (0.0, 0.01, 0.05):
        shown = 0
        for _ in range(100):
            pictures, trainings = 0.01 * 200**0.5 * rng.standard_normal((14, 1, 200)), rng.standard_normal((14, 3, 1))
            found = [difference(right, nothing, True, resamples=1) for right in pictures + spread * trainings]
            shown += min(adjusted_p(dict(enumerate(found))).values()) < 0.05
        assert shown <= 12, spread  # 5 are expected, and 13 or more come in one of 200 draws


def test_the_variance_over_data_sets_is_that_of_their_mean():
    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((3, 400)) + 0.1 for _ in range(2)]
    gaps = [difference(each, np.zeros((3, 400)), paired_seeds=True) for each in sets]
    joined = mean_over_sets(sets).variance
    assert joined.pictures == pytest.approx(sum(gap.variance.pictures for gap in gaps) / 4)
    assert joined.trainings == pytest.approx(sum(gap.variance.trainings for gap in gaps) / 4) and joined.freedom == 4


@pytest.mark.parametrize(("rounds", "kept"), [(5, (1, 5)), (6, (1, 6)), (7, (1, 7)), (9, (2, 8)), (21, (6, 16))])
def test_a_medians_interval_holds_it_in_95_of_100_cases_where_the_rounds_allow_that(rounds, kept):
    assert median_interval(list(range(1, rounds + 1))) == kept
    outside = stats.binom.cdf(kept[0] - 1, rounds, 0.5)
    assert 1 - 2 * outside >= (0.95 if rounds > 5 else 0.93)


def test_holm_multiplies_the_smallest_by_their_number_and_never_reverses_the_order():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


@pytest.mark.parametrize(
    ("first", "second", "paired", "message"),
    [
        (np.ones((1, 3)), np.ones((1, 4)), False, "3 and 4 pictures"),
        (np.ones((3, 4)), np.ones((2, 4)), True, "3 and 2 training seeds"),
        (np.ones(4), np.ones((1, 4)), False, "one row a training seed"),
    ],
)
def test_what_cannot_be_compared_is_named(first, second, paired, message):
    with pytest.raises(ValueError, match=message):
        difference(first, second, paired)

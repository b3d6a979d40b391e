"""Intervals over training seeds and pictures: the kind of benchmarks/protocol.md.

Shapes: S training seeds, M pictures, R resamples.

A hierarchical bootstrap draws pictures with replacement, the same ones for all models that saw them, and training
seeds with replacement. It draws S - 1 of S seeds, which makes the variance of their mean unbiased for few seeds
(J. N. K. Rao and C. F. J. Wu, 1988); S draws would give two thirds of it for three seeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from scipy import stats

RESAMPLES, CONFIDENCE = 2000, 0.95
_PART = 100
Name = TypeVar("Name", bound=Hashable)
Values = Sequence[Sequence[float]] | np.ndarray
"""One row a training seed, one column a picture; a tensor will do."""


@dataclass(frozen=True)
class Variance:
    """The two parts of a difference's variance.

    pictures: of its mean over the trainings, by the choice of pictures.
    trainings: of its mean over the pictures, by the choice of trainings; it has ``freedom`` degrees of freedom. One
        training has none, and its spread is not known.
    """

    pictures: float
    trainings: float
    freedom: int


@dataclass(frozen=True)
class Interval:
    """An estimate, the percentile interval's ends, and how many training seeds are behind it.

    One seed leaves the spread between trainings out: a table says so, and no headline is drawn from it.
    variance: of a difference, for ``adjusted_p``.
    """

    middle: float
    low: float
    high: float
    seeds: int
    variance: Variance | None = None

    @property
    def ends(self) -> tuple[float, float, float]:
        """(middle, low, high), as ``cells.points`` writes it."""
        return self.middle, self.low, self.high


def mean_interval(
    values: Values, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """The mean of values [S,M], such as right answers, with its interval. ValueError: not two axes, or an empty one."""
    values = _checked(values)
    draws = _draws(values, chosen_seeds(len(values), resamples, seed), resamples, seed)
    return Interval(values.mean(dtype=np.float64), *ends(draws, confidence), len(values))


def share_interval(right: int, pictures: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The interval's ends of one model's accuracy, ``right`` of so many pictures.

    How many right answers a resample holds is binomial, so that no picture has to be drawn. It is what
    ``mean_interval`` gives of one training seed, in no time. ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("an accuracy of no pictures; give one at least")
    return ends(np.random.default_rng(0).binomial(pictures, right / pictures, resamples) / pictures)


def difference(
    first: Values,
    second: Values,
    paired_seeds: bool = False,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Mean of ``first`` [S,M] less that of ``second`` [T,M] on the same pictures, with its interval and variance.

    paired_seeds: row n of both comes of the same training seed (S = T), and both are drawn together.
    ValueError: other pictures, or seeds that cannot be paired.
    """
    first, second = _checked(first), _checked(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} pictures: a difference needs the same ones")
    if paired_seeds and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} training seeds cannot be paired")
    chosen = chosen_seeds(len(first), resamples, seed)
    others = chosen if paired_seeds else chosen_seeds(len(second), resamples, seed + 1)
    draws = _draws(first, chosen, resamples, seed) - _draws(second, others, resamples, seed)
    middle = first.mean(dtype=np.float64) - second.mean(dtype=np.float64)
    of_seeds = [first - second] if paired_seeds else [first, -second]
    return Interval(middle, *ends(draws, confidence), min(len(first), len(second)), _variance(of_seeds))


def mean_over_sets(values: Sequence[Values], resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """The mean over data sets of the mean of each one's values [S,M], with its interval and variance.

    Sets have pictures and trainings of their own, so both are drawn apart for each. The interval's seeds are the fewest
    of a set.
    """
    checked = list(map(_checked, values))
    draws = np.mean(
        [_draws(each, chosen_seeds(len(each), resamples, n), resamples, n) for n, each in enumerate(checked)], axis=0
    )
    middle = float(np.mean([each.mean(dtype=np.float64) for each in checked]))
    parts, share = [_variance([each]) for each in checked], 1 / len(checked) ** 2
    variance = Variance(
        share * sum(part.pictures for part in parts),
        share * sum(part.trainings for part in parts),
        sum(part.freedom for part in parts),
    )
    return Interval(middle, *ends(draws, confidence), min(map(len, checked)), variance)


def adjusted_p(differences: Mapping[Name, Interval]) -> dict[Name, float]:
    """Two-sided p-values of the comparisons that one table makes, after Holm's correction over them.

    Two or three trainings tell little about their spread, and chance makes some of a table's spreads small. So a
    comparison takes its own spread or the mean of the table's, whichever is greater, with the degrees of freedom of
    all. Student's t has the effective degrees of freedom of both parts of the variance (F. E. Satterthwaite, 1946). By
    simulation (three trainings, 14 comparisons, none true) a table errs in 3 to 7 of 100 cases, whether the spread is
    nothing or many times that of the pictures; the share of resamples beyond 0 erred in up to 44.
    """
    known = [found.variance for found in differences.values() if found.variance.freedom]
    freedom = sum(part.freedom for part in known)
    pooled = sum(part.freedom * part.trainings for part in known) / freedom if freedom else 0.0
    return holm({name: _two_sided(found, pooled, freedom) for name, found in differences.items()})


def _two_sided(found: Interval, pooled: float, freedom: int) -> float:
    """A difference's p-value. pooled, freedom: the table's mean variance by trainings, and its degrees of freedom."""
    trainings = max(found.variance.trainings, pooled) if found.variance.freedom else 0.0
    variance = found.variance.pictures + trainings
    if not variance:
        return float(found.middle == 0)
    effective = variance**2 * freedom / trainings**2 if trainings else np.inf
    return float(2 * stats.t.sf(abs(found.middle) / variance**0.5, effective))


def _variance(sides: Sequence[np.ndarray]) -> Variance:
    """The variance of the sum of each side's mean; sides [S,M] have trainings of their own and the same pictures."""
    of_pictures = sum(side.mean(0, dtype=np.float64) for side in sides)
    pictures = float(of_pictures.var(ddof=1)) / len(of_pictures) if len(of_pictures) > 1 else 0.0
    several = [side.mean(1, dtype=np.float64) for side in sides if len(side) > 1]
    trainings = sum(float(means.var(ddof=1)) / len(means) for means in several)
    return Variance(pictures, trainings, sum(len(means) - 1 for means in several))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down adjustment (S. Holm, 1979) of the p-values of the comparisons that one table makes."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def picture_weights(pictures: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each picture is drawn, fp32, in parts of up to [100,M]; equal arguments give equal draws."""
    counts = _counts(pictures, resamples, seed)
    for start in range(0, resamples, _PART):
        yield counts[start : start + _PART].astype(np.float32)


# A table compares many models on the same pictures, and drawing takes ten times as long as the products do.
@lru_cache(maxsize=4)
def _counts(pictures: int, resamples: int, seed: int) -> np.ndarray:
    """How often each picture is drawn, [R,M]. uint8: of M draws no picture has 256 but by a chance that never comes."""
    rng = np.random.default_rng((seed, 0))
    counts = np.empty((resamples, pictures), np.uint8)
    for start in range(0, resamples, _PART):
        drawn = rng.integers(0, pictures, (min(_PART, resamples - start), pictures))
        for row, places in zip(counts[start:], drawn, strict=False):
            row[:] = np.bincount(places, minlength=pictures)
    counts.flags.writeable = False
    return counts


def _draws(values: np.ndarray, chosen: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean of values [S,M] over the pictures and the chosen seeds [R,K] of every resample: [R]."""
    parts = [weights @ values.T for weights in picture_weights(values.shape[1], resamples, seed)]
    by_seed = np.concatenate(parts).astype(np.float64) / values.shape[1]
    return np.take_along_axis(by_seed, chosen, axis=1).mean(axis=1)


def chosen_seeds(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """The training seeds of every resample, [R,S-1], or the only one."""
    return np.random.default_rng((seed, 1)).integers(0, seeds, (resamples, max(1, seeds - 1)))


def ends(draws: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle ``confidence`` of the draws: its lower and upper end."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics of some rounds that hold the median in 95 % of cases or more, whatever the distribution.

    Fewer than 6 rounds cannot reach that: from the least to the greatest of 5 it is 94 %, of 3 75 %.
    """
    ordered = sorted(values)
    outside = max(0, int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5)) - 1)
    return ordered[outside], ordered[-1 - outside]


def _checked(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"values of shape {array.shape}: give one row a training seed, one column a picture")
    return array

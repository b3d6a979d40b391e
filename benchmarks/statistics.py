"""Intervals over training seeds and pictures: the kind of benchmarks/protocol.md.

Shapes: S training seeds, M pictures, R resamples.

A hierarchical bootstrap draws pictures with replacement, the same ones for all models that saw them, and training
seeds with replacement. It draws S - 1 of S seeds, which makes the variance of their mean unbiased for few seeds
(J. N. K. Rao and C. F. J. Wu, 1988); S draws would give two thirds of it for three seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES, CONFIDENCE = 2000, 0.95
_PART = 100
Values = Sequence[Sequence[float]] | np.ndarray
"""One row a training seed, one column a picture; a tensor will do."""


@dataclass(frozen=True)
class Interval:
    """An estimate, the percentile interval's ends, and how many training seeds are behind it.

    One seed leaves the spread between trainings out: a table says so, and no headline is drawn from it.
    p: of a difference, two-sided: twice the share of resamples on the other side of 0.
    """

    middle: float
    low: float
    high: float
    seeds: int
    p: float | None = None

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
    """Mean of ``first`` [S,M] less that of ``second`` [T,M] on the same pictures, with its interval and p.

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
    return Interval(middle, *ends(draws, confidence), min(len(first), len(second)), _two_sided(draws))


def mean_over_sets(values: Sequence[Values], resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """The mean over data sets of the mean of each one's values [S,M], with its interval and p.

    Sets have pictures and trainings of their own, so both are drawn apart for each. The interval's seeds are the fewest
    of a set.
    """
    checked = list(map(_checked, values))
    draws = np.mean(
        [_draws(each, chosen_seeds(len(each), resamples, n), resamples, n) for n, each in enumerate(checked)], axis=0
    )
    middle = float(np.mean([each.mean(dtype=np.float64) for each in checked]))
    return Interval(middle, *ends(draws, confidence), min(map(len, checked)), _two_sided(draws))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (S. Holm, 1979) of the p-values of the comparisons that one table makes."""
    adjusted, largest = {}, 0.0
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


def _two_sided(draws: np.ndarray) -> float:
    """Twice the share of resampled differences [R] on the other side of 0; never 0 itself."""
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, 2 * (int(tail) + 1) / (len(draws) + 1))


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


def median_interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median of some rounds."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (resamples, len(values)))
    return ends(np.median(drawn, axis=1))


def _checked(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"values of shape {array.shape}: give one row a training seed, one column a picture")
    return array

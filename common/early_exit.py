"""Early exit computed from confidences that were measured once, at any threshold, without running the model again.

Shapes: B or M images, C classes, P levels of a model (coarsest first), S thresholds.

An image exits at the first level whose confidence reaches the threshold; the last level always answers. One threshold
serves all levels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEVER = 2.0
"""A threshold that no confidence reaches: every image goes through all levels."""


def margin(probabilities: Tensor) -> Tensor:
    """Largest minus second largest probability, [B] of [B,C]; C is two at least."""
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


def exit_at(threshold: float, confidence: Tensor, correct: Tensor) -> tuple[Tensor, list[float]]:
    """Correctness [M] of the answers behind a threshold, and the share of images that exit at each level [P].

    confidence: [P-1,M], of every level but the last.  correct: bool [P,M].
    """
    stops = torch.cat([confidence >= threshold, torch.ones_like(correct[:1])])
    level = stops.int().argmax(0)
    shares = torch.bincount(level, minlength=len(stops)).double() / len(level)
    return correct.gather(0, level.unsqueeze(0)).squeeze(0), shares.tolist()


def threshold_for(confidence: Tensor, share: float) -> float:
    """The threshold below which round(share M) of the confidences [M] lie, half-way to the next one.

    Where equal confidences lie on both sides of that place, none of them is refined, and the share is smaller.
    0 refines nothing and NEVER everything. ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} must be a fraction in [0, 1]")
    ordered, refined = confidence.sort().values, round(share * len(confidence))
    if refined == 0:
        return 0.0
    if refined == len(confidence):
        return NEVER
    below, above = ordered[refined - 1], ordered[refined]
    middle = (below + above) / 2  # rounds to ``below`` where the two are neighbours
    return float(middle if middle > below else above)


class ThresholdSweep:
    """Means over images at every threshold that changes an exit, all from one sort.

    confidence: [M,P-1], of every level but the last.

    An image passes level l when the threshold exceeds its confidences at all levels up to l, so when it exceeds their
    running maximum. Each running maximum is an event at which one image goes on from l to l+1.
    """

    def __init__(self, confidence: np.ndarray) -> None:
        maxima = np.maximum.accumulate(confidence, axis=1).ravel()
        self._order = maxima.argsort(kind="stable")
        # Equal maxima are passed together: they are one group.
        values, self._group = np.unique(maxima[self._order], return_inverse=True)
        values = values.astype(float)
        # Half-way between two values, a threshold is safe from rounding.
        self.thresholds: np.ndarray = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [NEVER]])
        """The thresholds [S], ascending, from every image at the first level to every image at the last."""

    def gain(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weighted mean of ``values`` at each exit, less that of the first level: [S].

        values: [P], or [M,P] where they differ by image.  weights: how often each image counts [M].
        """
        # 1. What each image adds by passing each level, in the order of the events.
        steps = (weights[:, None] * np.diff(values, axis=-1)).ravel()[self._order]
        # 2. The sum of each group, and then of all groups below a threshold.
        return np.concatenate([[0.0], np.cumsum(np.bincount(self._group, steps)) / weights.sum()])

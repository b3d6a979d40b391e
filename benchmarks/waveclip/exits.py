"""Operating points of early exit and what a gate is worth, from answers that trainings left.

Shapes: M images, S training seeds.

An image is refined when its confidence at the first step is below the threshold; ``common.early_exit`` has the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.waveclip.saving import Exits
from common.early_exit import threshold_for


class Refined(NamedTuple):
    """Two-step classifiers of S training seeds behind their thresholds.

    thresholds: of each seed.  correct: bool [S,M], the answers that stand.  share: of refined images, mean over S.
    """

    thresholds: list[float]
    correct: np.ndarray
    share: float


def refined_by_share(val: Sequence[Exits], seen: Sequence[Exits], share: float) -> Refined:
    """What the classifiers answer in ``seen`` when each has the threshold that refines ``share`` of its ``val``.

    val, seen: one entry a training seed.
    """
    thresholds = [threshold_for(torch.from_numpy(exits.confidence), share) for exits in val]
    late = [exits.confidence < threshold for exits, threshold in zip(seen, thresholds, strict=True)]
    correct = [np.where(rows, exits.second, exits.first) for rows, exits in zip(late, seen, strict=True)]
    return Refined(thresholds, np.stack(correct), fmean(float(rows.mean()) for rows in late))


def least_confident_refined(seen: Sequence[Exits], share: float) -> tuple[np.ndarray, float]:
    """The answers that stand when each seed refines its least confident images: bool [S,M], and the share refined.

    That share is ``share`` in whole images. Images of equal confidence are refined in their order.
    """
    refined = round(share * len(seen[0].confidence))
    correct = [np.where(_places(exits) < refined, exits.second, exits.first) for exits in seen]
    return np.stack(correct), refined / len(seen[0].confidence)


def over_all_shares(exits: Exits) -> np.ndarray:
    """How often each image's answer is right over all shares of refined images, fp64 [M].

    Of M images 0, 1, ... or M can be refined, the least confident first. The mean over the images is the mean accuracy
    of these M + 1 operating points.
    """
    late = (len(exits.confidence) - _places(exits)) / (len(exits.confidence) + 1)
    return late * exits.second + (1 - late) * exits.first


def _places(exits: Exits) -> np.ndarray:
    """Each image's place in the order of confidences, from 0, the least confident; int [M]."""
    return exits.confidence.argsort(kind="stable").argsort()


def separation(confidence: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Each image's part in the AUROC of a confidence for an outcome (bool [M]), fp64 [M].

    The AUROC is how often an image with the outcome is more confident than one without (ties: half). The mean of the
    parts is the AUROC, their variance over M is its variance by E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson
    (1988). So they are values as a mean over images and a paired difference take them.
    ValueError: all images have the outcome, or none.
    """
    if outcome.all() or not outcome.any():
        raise ValueError(f"{outcome.sum()} of {len(outcome)} images have the outcome; an AUROC needs both kinds")
    ranks, parts = rankdata(confidence), np.empty(len(confidence))
    for rows, sign in ((outcome, 1), (~outcome, -1)):
        # Where an image of one kind lies among those of the other: its rank among all less that among its own.
        below = (ranks[rows] - rankdata(confidence[rows])) / (~rows).sum()
        place = below if sign > 0 else 1 - below
        parts[rows] = place.mean() + (place - place.mean()) / rows.mean()
    return parts

"""Operating points of early exit, from answers that were observed once: curves and separation.

Shapes: M images, L levels, S training seeds.

An image is refined when its confidence at a level is below the threshold; ``common.early_exit`` has the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.observed import Observed
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


def curve_by_share(
    confidence: Tensor, coarse: Tensor, fine: Tensor, count: int = 51
) -> tuple[list[float], list[float]]:
    """Shares of refined images, spread evenly over [0, 1], and the accuracy when the least confident are refined.

    confidence [M]; coarse, fine: bool [M], correctness.  Images of equal confidence are refined in their order.
    """
    # 1. The order in which a rising threshold refines the images.
    order = confidence.argsort(stable=True)
    # 2. What refining the first n of them changes in the number of correct answers.
    gained = torch.cat([torch.zeros(1), (fine.float() - coarse.float())[order].cumsum(0)])
    # 3. That change at evenly spread n.
    refined = torch.linspace(0, len(order), count).round().long()
    accuracy = (coarse.sum() + gained[refined]) / len(order)
    return (refined / len(order)).tolist(), accuracy.tolist()


def curve_by_threshold(answers: Observed, costs: Sequence[Cost], count: int = 51) -> list[dict[str, Any]]:
    """Accuracy, expected GMACs and the shares of images that exit at each level, for any number of levels.

    costs: of an exit at each level [L]. The thresholds part all levels' margins into equal shares, from none refined
    to all; with one level to refine these are the points of ``curve_by_share``.
    """
    margins, curve = answers.margin.flatten(), []
    for share in torch.linspace(0, 1, count, dtype=torch.float64).tolist():
        correct, shares = answers.at(threshold_for(margins, share))
        gmacs = expected(costs, shares).macs.gmacs
        curve.append({"shares": shares, "gmacs": gmacs, "accuracy": correct.double().mean().item()})
    return curve


def separation(confidence: Tensor, outcome: Tensor) -> float:
    """AUROC: how often an image with the outcome (bool [M]) is more confident than one without (ties: half)."""
    return float(binary_auroc(confidence.double(), outcome.long()))

"""Operating points of early exit, from answers that were observed once: curves, separation, headline.

Shapes: M images, L levels.

An image is refined when its confidence at a level is below the threshold; ``common.early_exit`` has the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from benchmarks.cells import points
from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.observed import Observed
from common.early_exit import threshold_for
from common.evaluate.accuracy import paired_difference

CLEARLY_BETTER, NEAR = 0.05, 0.03
"""Savings count for a student whose fine level is so far above its coarse one, this near the teacher."""

GOALS = {"student": 0.005, "teacher": 0.002}
"""How far an operating point may lie below its reference: the student that refines all, the teacher."""


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


def headline(val: Observed, test: Observed, costs: Sequence[Cost], dense: float) -> dict[str, Any]:
    """Multiply-adds saved against the dense teacher (``dense`` GMACs) at two accuracies, or why none.

    costs: of an exit at the coarse and at the fine level.

    Savings count where, on ``test``, the fine level is clearly better than the coarse one and near the teacher, each
    by the lower end of the paired interval. A goal's threshold refines the least share, in steps of 1 %, with which
    ``val`` reaches the goal; ``test`` then decides whether it is reached. A goal is reached when the lower end of the
    paired interval is above its allowance.
    """
    gain = paired_difference(test.fine, test.coarse)
    behind = paired_difference(test.fine, test.teacher)
    reasons = []
    if gain[1] < CLEARLY_BETTER:
        reasons.append(f"the fine level is {points(gain)} points from the coarse one, not clearly 5 above")
    if behind[1] < -NEAR:
        reasons.append(f"the fine level is {points(behind)} points from the teacher, not clearly within 3")
    goals = [] if reasons else [_goal(name, val, test, costs, dense) for name in GOALS]
    return {"gain": gain, "behind": behind, "reasons": reasons, "goals": goals}


def _goal(name: str, val: Observed, test: Observed, costs: Sequence[Cost], dense: float) -> dict[str, Any]:
    reference = {"student": "fine", "teacher": "teacher"}[name]
    goal = {"reference": name, "allowance": GOALS[name]}
    for percent in range(101):
        threshold = threshold_for(val.margin[0], percent / 100)
        if paired_difference(val.at(threshold)[0], getattr(val, reference))[1] >= -GOALS[name]:
            break
    else:
        return goal | {"reached": False, "threshold": None}
    correct, (_, refined) = test.at(threshold)
    difference = paired_difference(correct, getattr(test, reference))
    gmacs = expected(costs, [1 - refined, refined]).macs.gmacs
    return goal | {
        "reached": difference[1] >= -GOALS[name],
        "threshold": threshold,
        "refined": refined,
        "accuracy": correct.double().mean().item(),
        "difference": difference,
        "gmacs": gmacs,
        "saved": 1 - gmacs / dense,
    }


def headline_lines(result: dict[str, Any]) -> list[str]:
    """The headline in words, or why there is none."""
    if result["reasons"]:
        return [f"No headline: {'; '.join(result['reasons'])}."]
    references = {"student": "the student's own full accuracy", "teacher": "the teacher's accuracy"}
    lines = []
    for goal in result["goals"]:
        aim = f"{references[goal['reference']]} minus {100 * goal['allowance']:.1f} points"
        if goal["threshold"] is None:
            lines.append(f"At {aim}: not reached by any threshold on val.")
            continue
        outcome = "reached" if goal["reached"] else "NOT reached on test"
        lines.append(
            f"At {aim}: {100 * goal['saved']:.1f} % of the dense teacher's GMACs saved "
            f"({100 * goal['refined']:.1f} % refined; paired difference {points(goal['difference'])} "
            f"points: {outcome})."
        )
    return lines

"""The arithmetic of early exit on what was observed once: thresholds, frontiers, separation, headline.

Shapes: M pictures.  A picture is refined when its confidence at the coarse level is below the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from benchmarks.cells import points
from benchmarks.waveclip.costs import Cost, expected
from common.deploy.early_exit import exit_at, threshold_for
from common.evaluate.accuracy import paired_difference

CLEARLY_BETTER, NEAR = 0.05, 0.03
"""Savings count for a student whose fine level is so far above its coarse one, this near the teacher."""

GOALS = {"student": 0.005, "teacher": 0.002}
"""How far an operating point may lie below its reference: the student that refines all, the teacher."""


@dataclass(frozen=True)
class Outcomes:
    """What teacher and one-level student said about M pictures, in one order.

    margin, maximum: fp32 [M], the coarse level's two confidences.
    coarse, fine, teacher: bool [M], whose first guess was right.
    agree: bool [M], coarse and fine guess alike.
    """

    margin: Tensor
    maximum: Tensor
    coarse: Tensor
    fine: Tensor
    teacher: Tensor
    agree: Tensor

    def at(self, threshold: float) -> tuple[Tensor, float]:
        """Correctness [M] behind a margin gate with this threshold, and the share of refined pictures."""
        correct, (_, refined) = exit_at(threshold, self.margin[None], torch.stack([self.coarse, self.fine]))
        return correct, refined


def frontier(confidence: Tensor, coarse: Tensor, fine: Tensor, points: int = 51) -> tuple[list[float], list[float]]:
    """Shares of refined pictures, spread over [0, 1], and the accuracy when the least confident are refined.

    confidence [M]; coarse, fine: bool [M].
    """
    order = confidence.argsort(stable=True)
    gained = torch.cat([torch.zeros(1), (fine.float() - coarse.float())[order].cumsum(0)])
    refined = torch.linspace(0, len(order), points).round().long()
    accuracy = (coarse.sum() + gained[refined]) / len(order)
    return (refined / len(order)).tolist(), accuracy.tolist()


def separation(confidence: Tensor, outcome: Tensor) -> float:
    """AUROC: how often one with the outcome (bool [M]) is more confident than one without (ties: half)."""
    return float(binary_auroc(confidence.double(), outcome.long()))


def headline(val: Outcomes, test: Outcomes, costs: Sequence[Cost], dense: float) -> dict[str, Any]:
    """Multiply-adds saved against the dense teacher (``dense`` GMACs) at two accuracies, or why none.

    costs: of leaving at the coarse and at the fine level. Savings count only where the fine level is clearly
    better than the coarse one and near the teacher on ``test``, each by the paired interval's end. A goal's
    threshold is that of the least share, in steps of 1 %, with which ``val`` reaches the goal; whether it is
    reached is said by ``test``. To reach is to have the lower end of the paired interval above the allowance.
    """
    gain = paired_difference(test.fine, test.coarse)
    behind = paired_difference(test.fine, test.teacher)
    reasons = []
    if gain[1] < CLEARLY_BETTER:
        reasons.append(f"the fine level is {points(gain)} points from the coarse one, not clearly 5 above")
    if behind[1] < -NEAR:
        reasons.append(f"the fine level is {points(behind)} points from the teacher, not clearly within 3")
    found = {"gain": gain, "behind": behind, "reasons": reasons, "goals": []}
    if not reasons:
        found["goals"] = [_goal(name, val, test, costs, dense) for name in GOALS]
    return found


def _goal(name: str, val: Outcomes, test: Outcomes, costs: Sequence[Cost], dense: float) -> dict[str, Any]:
    reference: Callable[[Outcomes], Tensor] = {
        "student": lambda of: of.fine,
        "teacher": lambda of: of.teacher,
    }[name]
    goal = {"reference": name, "allowance": GOALS[name]}
    for percent in range(101):
        threshold = threshold_for(val.margin, percent / 100)
        if paired_difference(val.at(threshold)[0], reference(val))[1] >= -GOALS[name]:
            break
    else:
        return goal | {"reached": False, "threshold": None}
    correct, refined = test.at(threshold)
    difference = paired_difference(correct, reference(test))
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


def headline_lines(found: dict[str, Any]) -> list[str]:
    """The headline in words, or why there is none."""
    if found["reasons"]:
        return [f"No headline: {'; '.join(found['reasons'])}."]
    named = {"student": "the student's own full accuracy", "teacher": "the teacher's accuracy"}
    lines = []
    for goal in found["goals"]:
        aim = f"{named[goal['reference']]} minus {100 * goal['allowance']:.1f} points"
        if goal["threshold"] is None:
            lines.append(f"At {aim}: not reached by any threshold on val.")
            continue
        said = "reached" if goal["reached"] else "NOT reached on test"
        lines.append(
            f"At {aim}: {100 * goal['saved']:.1f} % of the dense teacher's GMACs saved "
            f"({100 * goal['refined']:.1f} % refined; paired difference {points(goal['difference'])} "
            f"points: {said})."
        )
    return lines

"""Early exit over any number of levels, on what was observed once: exits, accuracy and cost by threshold.

Shapes: B images of a batch, M pictures in all, S embeddings of a picture (its levels and one more), C classes.

One threshold serves all levels, as in ``ProgressiveClassifier``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded import readings
from benchmarks.waveclip.costs import Cost, expected
from common.clip import CLIP
from common.deploy.early_exit import exit_at, threshold_for
from waveclip import MarginGate, WaveTower


@dataclass(frozen=True)
class Levels:
    """What a student said at every level about M pictures, and its teacher, in one order.

    margin: fp32 [S-1,M], the confidence at every level but the last, which always answers.
    right: bool [S,M], whether each level's first guess was right.  teacher: bool [M], whether the teacher's was.
    """

    margin: Tensor
    right: Tensor
    teacher: Tensor

    def at(self, threshold: float) -> tuple[Tensor, list[float]]:
        """Correctness [M] behind a margin gate with this threshold, and the share of pictures leaving each level."""
        return exit_at(threshold, self.margin, self.right)


def observe_levels(
    teacher: CLIP, student: WaveTower, loader: Iterable[Mapping[str, Any]], prompts: list[str]
) -> Levels:
    """One pass over ``readings``: what both models say about every picture."""
    gate, found = MarginGate(0.0), []
    for levels, dense, labels in readings(teacher, student, loader, prompts):
        margin = torch.stack([gate.confidence(scores) for scores in levels[:-1]])
        right = torch.stack([scores.argmax(-1) == labels for scores in levels])
        found.append((margin, right, dense.argmax(-1) == labels))
    return Levels(*(torch.cat(column, dim=-1) for column in zip(*found, strict=True)))


def frontier(of: Levels, costs: Sequence[Cost], points: int = 51) -> list[dict[str, Any]]:
    """Accuracy, expected GMACs and the shares of pictures that leave at each level, over all thresholds.

    costs: of leaving at each level. The thresholds part all margins that are asked for into equal shares, from none
    refined to all; with one level these are the points of ``exits.frontier``.
    """
    asked, found = of.margin.flatten(), []
    for share in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        correct, shares = of.at(threshold_for(asked, share))
        gmacs = expected(costs, shares).macs.gmacs
        found.append({"shares": shares, "gmacs": gmacs, "accuracy": correct.double().mean().item()})
    return found

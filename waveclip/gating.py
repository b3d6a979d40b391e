"""Confidence gates: whether a level's class probabilities are sure enough to stop (WAVECLIP, section 3.3).

Shapes: B images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.early_exit import margin


def _check(name: str, threshold: float) -> None:
    if not threshold >= 0:  # NaN too
        raise ValueError(f"{name} threshold {threshold} must be 0 or more; 0 always stops, above 1 never")


@dataclass(frozen=True)
class MarginGate:
    """Stop when the margin, largest minus second largest probability, reaches the threshold (eq. 3)."""

    threshold: float

    def __post_init__(self) -> None:
        _check("margin", self.threshold)

    def confidence(self, probabilities: Tensor) -> Tensor:
        """probabilities [B,C] -> margin [B]. ValueError for fewer than two classes."""
        if probabilities.shape[-1] < 2:
            raise ValueError("a margin needs two classes at least; use MaxProbabilityGate")
        return margin(probabilities)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """probabilities [B,C] -> boolean [B], True where the answer stands (a tie with the threshold stops)."""
        return self.confidence(probabilities) >= self.threshold


@dataclass(frozen=True)
class MaxProbabilityGate:
    """Stop when the largest probability reaches the threshold: the paper's baseline gate."""

    threshold: float

    def __post_init__(self) -> None:
        _check("probability", self.threshold)

    def confidence(self, probabilities: Tensor) -> Tensor:
        """probabilities [B,C] -> largest probability [B]."""
        return probabilities.amax(dim=-1)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """probabilities [B,C] -> boolean [B], True where the answer stands (a tie with the threshold stops)."""
        return self.confidence(probabilities) >= self.threshold


def margin_threshold(relative: float, num_classes: int) -> float:
    """A margin threshold relative to the number of classes: relative / C.

    The paper says only that its threshold is relative to the class count (the formula did not survive in the
    text); dividing is our reading, since 1 / C is the probability of a guess.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes} must be positive")
    return relative / num_classes

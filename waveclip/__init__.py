"""WAVECLIP: coarse-to-fine wavelet tokens, a block-causal cache, and early exit behind a confidence gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from waveclip.adapted import AdaptedWaveTower
from waveclip.gating import MarginGate, MaxProbabilityGate, margin_threshold
from waveclip.progressive import Prediction, ProgressiveClassifier
from waveclip.tower import WaveTower

if TYPE_CHECKING:
    from waveclip.distillation import WaveCLIPDistillation

__all__ = [
    "AdaptedWaveTower",
    "MarginGate",
    "MaxProbabilityGate",
    "Prediction",
    "ProgressiveClassifier",
    "WaveCLIPDistillation",
    "WaveTower",
    "margin_threshold",
]


def __getattr__(name: str) -> Any:
    """Import the training on first use: it needs Lightning, which takes seconds, and the towers do not."""
    if name == "WaveCLIPDistillation":
        from waveclip.distillation import WaveCLIPDistillation

        return WaveCLIPDistillation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

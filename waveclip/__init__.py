"""WAVECLIP: coarse-to-fine wavelet tokens, a block-causal cache, and early exit behind a confidence gate."""

from waveclip.adapted import AdaptedWaveTower
from waveclip.distillation import WaveCLIPDistillation
from waveclip.gating import MarginGate, MaxProbabilityGate, margin_threshold
from waveclip.progressive import Prediction, ProgressiveClassifier
from waveclip.tower import WaveTower

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

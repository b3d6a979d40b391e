"""MLIP: an image tower that works in the frequency domain and merges tokens."""

from mlip.guide import Guide
from mlip.tower import EMBEDDED_LAYERS, PAPER_LAYERS, MLIPFeatures, MLIPTower

__all__ = ["EMBEDDED_LAYERS", "PAPER_LAYERS", "Guide", "MLIPFeatures", "MLIPTower"]

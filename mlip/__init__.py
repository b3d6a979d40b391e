"""MLIP: an image tower that works in the frequency domain and merges tokens."""

from mlip.guide import Guide
from mlip.model import MLIP
from mlip.pretraining import MLIPPretraining
from mlip.tower import EMBEDDED_LAYERS, PAPER_LAYERS, MLIPFeatures, MLIPTower

__all__ = ["EMBEDDED_LAYERS", "MLIP", "PAPER_LAYERS", "Guide", "MLIPFeatures", "MLIPPretraining", "MLIPTower"]

"""MLIP: an image tower that works in the frequency domain and merges tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlip.guide import Guide
from mlip.model import MLIP
from mlip.tower import PAPER_LAYERS, MLIPFeatures, MLIPTower

if TYPE_CHECKING:
    from mlip.pretraining import MLIPPretraining

__all__ = ["MLIP", "PAPER_LAYERS", "Guide", "MLIPFeatures", "MLIPPretraining", "MLIPTower"]


def __getattr__(name: str) -> Any:
    """Import the training on first use: it needs Lightning, which takes seconds, and the model does not."""
    if name == "MLIPPretraining":
        from mlip.pretraining import MLIPPretraining

        return MLIPPretraining
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Patch Ranking: a learned ranking chooses the image tokens that stay."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchrank.golden import GoldenRanking, golden_ranking
from patchrank.predictor import RankPredictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

if TYPE_CHECKING:
    from patchrank.predictor_training import RankPredictorTraining
    from patchrank.prompt_tuning import PromptTuning

__all__ = [
    "GoldenRanking",
    "PatchRankTower",
    "PromptTuning",
    "PromptedCLIP",
    "Prompts",
    "RankPredictor",
    "RankPredictorTraining",
    "golden_ranking",
]

_TRAININGS = {"RankPredictorTraining": "patchrank.predictor_training", "PromptTuning": "patchrank.prompt_tuning"}


def __getattr__(name: str) -> Any:
    """Import a training on first use: it needs Lightning, which takes seconds, and the towers do not."""
    if name in _TRAININGS:
        return getattr(import_module(_TRAININGS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

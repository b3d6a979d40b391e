"""Patch Ranking: a learned ranking chooses the image tokens that stay."""

from patchrank.golden import GoldenRanking, golden_ranking
from patchrank.predictor import RankPredictor
from patchrank.predictor_training import RankPredictorTraining
from patchrank.prompt_tuning import PromptTuning
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

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

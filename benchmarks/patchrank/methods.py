"""The pruning methods that Patch Ranking's tables compare, built on an image tower at one keep rate."""

from __future__ import annotations

from torch import nn

from common.reduction import Place, ReducedTower, Reducer
from common.tower import ImageTower
from patchrank.predictor import RankPredictor
from patchrank.reducers import ClassAttention, EViT, RandomKeep, ToMe
from patchrank.scores import keep_count
from patchrank.tower import PatchRankTower

DENSE, OURS = "all tokens", "Patch Ranking"


def merging(patches: int, blocks: int, keep: float, layer: int) -> dict[Place, Reducer]:
    """ToMe with the same number of merges in every block from ``layer`` on.

    Summed over the blocks, as many tokens are gone as when ``keep`` of the patches enter ``layer``.
    """
    removed = round(2 * (patches - keep_count(keep, patches)) / (blocks - layer + 1))
    return {(i, "middle"): ToMe(removed) for i in range(layer, blocks)}


def training_free(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """The methods that need no training, at one keep rate from block ``layer`` on.

    "given scores" keeps random patches: it has the cost of any order that is known beforehand.
    """
    patches, blocks = tower.grid**2, len(tower.transformer.resblocks)
    return {
        "given scores": ReducedTower(tower, {layer: RandomKeep(keep)}),
        "class attention": ReducedTower(tower, {layer: ClassAttention(keep)}),
        "EViT": ReducedTower(tower, {(layer, "middle"): EViT(keep)}),
        "ToMe": ReducedTower(tower, merging(patches, blocks, keep, layer)),
    }


def methods(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """The training-free methods, and Patch Ranking with a predictor of random weights."""
    ours = PatchRankTower(tower, RankPredictor.for_tower(tower), keep, layer)
    return {**training_free(tower, keep, layer), OURS: ours}

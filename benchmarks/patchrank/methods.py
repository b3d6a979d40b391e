"""The pruning methods that Patch Ranking's tables compare, built on an image tower at one keep rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.equal_cost import gap_in_words
from common.reducer_registry import REVISION, named, setting_for
from common.reduction import ReducedTower
from common.tower import ImageTower
from patchrank.predictor import RankPredictor
from patchrank.reducers import ClassAttention, EViT, RandomKeep
from patchrank.tower import PatchRankTower

DENSE, OURS = "all tokens", "Patch Ranking"
TITLES = {"A-ViT": "A-ViT, paper's gates"}
"""What tables call a row, where its stored name says less: the released gates are others, 10 and -30."""


def which_attention() -> str:
    """How "class attention" of the tables differs from the paper's, and how both compare in the sweeps."""
    share = 0.75
    gap = gap_in_words("class-attention-after", "class-attention", share)
    return (
        "The paper's code ranks by class attention after the block has run; here it is read before the block. The "
        f"former is `class-attention-after` of the sweeps, where at {100 * share:.0f} % of the whole tower's "
        f"multiply-adds it is {gap} against the form here (val)."
    )


def titled(row: str) -> str:
    """A row's name in tables and pictures."""
    return TITLES.get(row, row)


def remark(run: Mapping[str, Any]) -> str:
    """What a table must say of a run's reducers: nothing, or that they were the forms of revision 1."""
    if run.get("reducers") == REVISION:
        return ""
    return (
        " EViT, ToMe, A-ViT and MLIP's merging are here as they were before they followed released code and equal cost "
        "(CHANGELOG): EViT averages the fused tokens and rounds, ToMe's two sets are swapped."
    )


def training_free(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """The methods that need no training, at one keep rate from block ``layer`` on.

    "given scores" keeps random patches: it has the cost of any order that is known beforehand.
    """
    return {
        "given scores": ReducedTower(tower, {layer: RandomKeep(keep)}),
        "class attention": ReducedTower(tower, {layer: ClassAttention(keep)}),
        "EViT": ReducedTower(tower, {(layer, "middle"): EViT(keep)}),
        **{
            title: ReducedTower(tower, named(name).reducers(setting_for(tower, keep, layer)))
            for title, name in (("ToMe", "tome"), ("DivPrune", "divprune"), ("k-medoids", "kmedoids"))
        },
    }


def methods(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """The training-free methods, and Patch Ranking with a predictor of random weights."""
    ours = PatchRankTower(tower, RankPredictor.for_tower(tower), keep, layer)
    return {**training_free(tower, keep, layer), OURS: ours}

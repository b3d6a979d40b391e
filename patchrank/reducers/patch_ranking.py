"""Patch Ranking's predictor, and pruning by its ranking.

Shapes: B images, N tokens, K patch tokens, R kept, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.predictor import RankPredictor
from patchrank.reducers.base import Call, Keeping, in_order, most


@reducer(
    "patch-ranking",
    "Patch Ranking",
    needs=("training", "grid"),
    source="Wu et al., WACV 2025 (Patch Ranking)",
    licence="released code MIT",
    differs="The released predictor reads another network's last layer; here it reads the tokens that are about to be "
    "pruned. `patchrank/predictor.yaml` trains it for the tokens that enter one block, before which it then stands.",
    build=lambda setting: {setting.layer: PatchRanking(setting.keep, setting.trained)},
    exceptions={"levels": "the predictor's mixer has a fixed number of tokens"},
    untrained=lambda width, blocks, patches: RankPredictor(width, 1 + patches),
)
class PatchRanking(Keeping):
    """Keep the R patches that a trained predictor ranks highest, in the order of their places.

    It has learned the golden ranking, the order in which taking patches away changes the tower's answer least.

    predictor: tokens [B,1+K,D], class token first, -> scores [B,K], see ``RankPredictor``.
    """

    def __init__(self, keep: float, predictor: RankPredictor) -> None:
        super().__init__(keep)
        self.predictor = predictor

    def macs(self, call: Call) -> int:
        """The predictor's norms, linear maps and head; nothing where all patches stay."""
        return self.predictor.macs if self.left(call.patches) < call.patches else 0

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens. The choice has no gradient.

        ValueError: other tokens than the predictor was built for.
        """
        count = self.left(context.positions.shape[1])
        if count == context.positions.shape[1]:
            return x, context
        with torch.no_grad():
            scores = self.predictor(x[:, : x.shape[1] - context.trailing])
        return context.select(x, in_order(most(scores, count)))

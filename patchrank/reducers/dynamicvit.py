"""DynamicViT's prediction modules, and pruning by their scores.

Shapes: B images, N tokens, K patch tokens, R kept, D width, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.precision import wide_linear
from common.reducer_registry import reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, TokenReducer, most
from patchrank.scores import keep_count


class KeepPredictor(nn.Module):
    """A prediction module: log-probabilities that each patch token is kept, and that it is dropped.

    u = GELU(W LN(x)) has two halves, u = [u_local, u_global]. A token's score is read from its own u_local beside the
    mean of u_global over the tokens that are there: three linear maps to D/2, D/4 and 2, with GELU between them, and a
    log softmax.

    width: D, a multiple of 4. ValueError: another one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"a prediction module halves the width twice; {width} is no multiple of 4")
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, width)
        self.to_half, self.to_quarter = nn.Linear(width, width // 2), nn.Linear(width // 2, width // 4)
        self.to_scores = nn.Linear(width // 4, 2)
        for linear in (self.enter, self.to_half, self.to_quarter, self.to_scores):  # as released
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor, alive: Tensor | None = None) -> Tensor:
        """patches [B,K,D] -> log-probabilities [B,K,2], first of keeping, in fp32 at least.

        alive: [B,K], 1 for the tokens that are there and 0 for dropped ones; None: all are there.
        """
        own, shared = F.gelu(self.enter(self.norm(patches))).chunk(2, dim=-1)
        if alive is None:
            mean = shared.mean(1, keepdim=True)
        else:
            mean = (shared * alive[..., None]).sum(1, keepdim=True) / alive.sum(1).clamp(min=1)[:, None, None]
        u = torch.cat([own, mean.expand_as(shared)], dim=-1)
        hidden = F.gelu(self.to_quarter(F.gelu(self.to_half(u))))
        # Tied scores would keep the first rows of the picture.
        return wide_linear(self.to_scores, hidden).log_softmax(-1)


def stage_blocks(blocks: int) -> list[int]:
    """The blocks before which a tower of L blocks drops tokens.

    The published ones are 3, 6 and 9 of 12; other towers have theirs at the same quarters of their depth, fewer where
    two quarters begin with one block.
    """
    return sorted({quarter * blocks // 4 for quarter in (1, 2, 3)})


def keep_predictors(width: int, blocks: int) -> nn.ModuleDict:
    """Prediction modules for a tower of width D and L blocks, by the number of their block, see ``stage_blocks``."""
    return nn.ModuleDict({str(block): KeepPredictor(width) for block in stage_blocks(blocks)})


def stage_counts(keep: float, stages: int, patches: int) -> list[int]:
    """The tokens after each stage, of K at first: int(K ρ), int(K ρ²), ..., at least one.

    196 tokens at ρ = 0.7: 137, 96, 67.  ValueError: ρ is outside (0, 1].
    """
    keep_count(keep, 1)
    return [max(1, int(patches * keep**stage)) for stage in range(1, stages + 1)]


def predicted_reducers(predictors: nn.ModuleDict, keep: float, patches: int) -> dict[Place, Reducer]:
    """The reducers of all stages, before the blocks that ``predictors`` names, for K patches at base rate ``keep``."""
    counts = stage_counts(keep, len(predictors), patches)
    stages = sorted((int(block), predictor) for block, predictor in predictors.items())
    return {block: DynamicViT(predictor, count) for (block, predictor), count in zip(stages, counts, strict=True)}


@reducer(
    "dynamicvit",
    "DynamicViT",
    needs=("training",),
    source="Rao et al., NeurIPS 2021 (DynamicViT)",
    licence="released code MIT",
    differs="keep is its base rate ρ: the stages keep ρ, ρ² and ρ³ of the patches, and no layer is read. It learns "
    "from a CLIP's embeddings instead of classes: `patchrank/dynamicvit.yaml`.",
    build=lambda setting: predicted_reducers(setting.trained, setting.keep, setting.patches),
    untrained=lambda width, blocks, patches: keep_predictors(width, blocks),
)
class DynamicViT(TokenReducer):
    """Keep the R patches that a trained module gives the highest log p(keep), at three places of the tower.

    p = softmax(MLP([u_local, mean of u_global])), where u = GELU(W LN(x)) is a token's in two halves. While training,
    tokens are drawn by p and masked from attention instead, so that their number is free and gradients reach p.

    predictor: tokens [B,K,D] -> log-probabilities [B,K,2], see ``KeepPredictor``.  count: R.
    """

    def __init__(self, predictor: KeepPredictor, count: int) -> None:
        super().__init__()
        self.predictor, self.count = predictor, count

    def left(self, patches: int) -> int:
        return min(self.count, patches)

    def macs(self, call: Call) -> int:
        """The module's norm and linear maps on every patch; nothing where all patches stay."""
        if call.patches <= self.count:
            return 0
        half, quarter = call.width // 2, call.width // 4
        maps = call.width**2 + call.width * half + half * quarter + 2 * quarter
        return call.patches * (5 * call.width + maps)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, the highest score first. The choice has no gradient."""
        patches = context.patches(x)
        if patches.shape[1] <= self.count:
            return x, context
        with torch.no_grad():
            scores = self.predictor(patches)[..., 0]
        return context.select(x, most(scores, self.count))

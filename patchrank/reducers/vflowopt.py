"""VFlowOpt's importance: the attention of the most attended tokens plus the entropy of pixels; the rest is recycled.

Shapes: B images, S image size, N tokens, K patch tokens, R left, H heads, D width, g patches a side, P = S/g pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.precision import wide
from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, marked, most
from patchrank.reducers.groups import append_fused

LEVELS = 256


def patch_entropy(images: Tensor, grid: int) -> Tensor:
    """The entropy in bits [B,g²] of the grey levels in each patch of images [B,3,S,S].

    Grey is the mean of the channels, in 256 levels between the least and the greatest of the picture.
    """
    side = int(images.shape[-1]) // grid  # a traced size is a tensor
    grey = wide(images).mean(1)[:, : grid * side, : grid * side]
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    level = (grey - low) / (high - low).clamp(min=torch.finfo(grey.dtype).tiny) * (LEVELS - 1)
    level = level.round().long().unflatten(1, (grid, side)).unflatten(3, (grid, side))  # [B,g,P,g,P]
    level = level.transpose(2, 3).flatten(1, 2).flatten(2)
    counts = grey.new_zeros(*level.shape[:2], LEVELS).scatter_add(2, level, torch.ones_like(level, dtype=grey.dtype))
    share = counts / side**2
    return -(share * share.clamp(min=torch.finfo(grey.dtype).tiny).log()).sum(-1) / math.log(2)


def context_relevance(attention: Tensor, threshold: float) -> Tensor:
    """The attention [B,N] that the global tokens pay to each token, mean over them.

    attention: [B,N,N], mean over heads.  A token is global if it receives more than ``threshold`` times the mean; the
    one that receives most always is.
    """
    received = attention.mean(1)
    chosen = received > threshold * received.mean(1, keepdim=True)
    chosen = chosen.logical_or(received == received.amax(1, keepdim=True)).to(attention.dtype)
    return (attention * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)


def _build(setting: Setting) -> dict[Place, Reducer]:
    return {(setting.layer, "middle"): VFlowOpt(setting.keep, setting.grid)}


@reducer(
    "vflowopt",
    "VFlowOpt",
    place="middle",
    needs=("attention", "pixels"),
    source="Yang et al., ICCV 2025 (VFlowOpt)",
    licence="released code CC-BY-NC-4.0; nothing of it is here",
    differs="The released code searches the constants of each model (for LLaVA-OneVision t = 29 to 39 of 729 tokens, "
    "α = 0). Here there is no search: t is the default of its functions, and α = 1 is ours. The released code prunes "
    "behind the tower and again in the language model. It recycles a token for every cell of 12 to 17 patches a side. "
    "A CLIP's grid mostly has fewer, so here there is one token for the picture. There pixels wrap around below 0. "
    "Here grey levels are the picture's own. There the mean over no global token is no number. Here the most attended "
    "token is always global.",
    build=_build,
    exceptions={"levels": "the tokens of a level are no patches of pixels"},
)
class VFlowOpt(Keeping):
    """Keep the R - 1 patches of highest importance; the others become one recycled token, their mean by importance.

    I_j = mean over the global tokens i of A_ij, plus α softmax(entropy)_j. A is the block's attention, mean over heads;
    global tokens, the class token perhaps among them, receive more than t times the mean. Entropy is that of a patch's
    grey levels in bits; a token of several patches has none. R = keep·K.

    grid: g.  threshold: t.  entropy: α.
    ValueError: a constant that is negative.
    """

    def __init__(self, keep: float, grid: int, threshold: float = 7.0, entropy: float = 1.0) -> None:
        super().__init__(keep)
        for name, value in (("threshold", threshold), ("entropy", entropy)):
            if not value >= 0:
                raise ValueError(f"{name} {value} is negative; give 0 or more")
        self.grid, self.threshold, self.entropy = grid, threshold, entropy

    def macs(self, call: Call) -> int:
        """The attention matrix, and the recycled token."""
        if self.left(call.patches) == call.patches:
            return 0
        return call.attention + call.patches * call.width

    def importance(self, context: ReductionContext) -> Tensor:
        """I [B,K] of the patch tokens. ValueError: an α above 0 in a tower whose tokens are no patches of pixels."""
        relevance = context.patches(context_relevance(context.attention().mean(1), self.threshold))
        if not self.entropy:
            return relevance
        if context.images is None:
            raise ValueError("vflowopt reads the pixels of each patch, which this tower has none of; give entropy=0")
        entropy = patch_entropy(context.images, self.grid)
        entropy = entropy.gather(1, context.positions.clamp(min=0)).masked_fill(context.positions < 0, 0)
        return relevance + self.entropy * entropy.softmax(-1).to(relevance.dtype)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens: R - 1 in the order of their places, and the recycled one, position -1."""
        tokens = context.positions.shape[1]
        count = self.left(tokens)
        if count == tokens:
            return x, context
        with torch.no_grad():
            importance = self.importance(context)
            kept = in_order(most(importance, count - 1))
            gone = ~marked(importance, kept)
            weights = importance * gone
            # All of them may be 0; the recycled token is then 0.
            weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        short, remaining = context.select(x, kept)
        return append_fused(short, remaining, x, context, weights, gone)

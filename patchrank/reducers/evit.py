"""EViT: the attended patches stay, the others become one token.

Shapes: B images, N tokens, K patch tokens, R kept, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, marked, most
from patchrank.reducers.groups import append_fused
from patchrank.scores import keep_count


@reducer(
    "evit-averaged",
    "EViT, averaged",
    place="middle",
    needs=("class token",),
    source="ours, after EViT",
    licence="none is needed",
    differs="keep·K is rounded, not rounded up, and the fused token is the attention-weighted mean of its patches, so "
    "it has the scale of a token. Otherwise it is `evit`, which does what the released code does.",
    options={"form": "averaged"},
)
@reducer(
    "evit",
    "EViT",
    place="middle",
    needs=("class token",),
    source="Liang et al., ICLR 2022 (EViT)",
    licence="released code Apache-2.0",
    differs="This is the released form; `evit-averaged` is the other one. It stands at three places there (blocks 3, "
    "6, 9). After a reducer with proportional attention the fused token counts as its patches do.",
)
class EViT(Keeping):
    """Keep the ceil(keep·K) patches to which the class token attends most, and fuse the others: x_f = Σ a_j x_j.

    a is the class token's attention in this block, mean over heads. As released it is not normalised over the fused
    patches, so the fused token is as small as the attention that they got. It stands between the half steps.

    form: "released"; or "averaged", where keep·K is rounded and x_f = Σ a_j x_j / Σ a_j.
    fuse: False drops the others.
    """

    def __init__(self, keep: float, form: Literal["released", "averaged"] = "released", fuse: bool = True) -> None:
        super().__init__(keep)
        if form not in ("released", "averaged"):
            raise ValueError(f"form {form!r} is none of released, averaged")
        self.form, self.fuse = form, fuse

    def kept(self, patches: int) -> int:
        """How many patches stay as they are."""
        return keep_count(self.keep, patches) if self.form == "averaged" else math.ceil(self.keep * int(patches))

    def left(self, patches: int) -> int:
        kept = self.kept(patches)
        return kept + (self.fuse and kept < patches)

    def macs(self, call: Call) -> int:
        """The class token's row, and the fused token."""
        return call.class_row + (self.left(call.patches) > self.kept(call.patches)) * call.patches * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first, and the fused one, of position -1."""
        attention = context.class_attention()
        kept = most(attention, self.kept(attention.shape[1]))
        short, remaining = context.select(x, kept)
        if not self.fuse or kept.shape == attention.shape:
            return short, remaining
        gone = ~marked(attention, kept)
        weights = attention
        if self.form == "averaged":
            total = (attention * gone).sum(1, keepdim=True)
            weights = attention / total.clamp(min=torch.finfo(total.dtype).tiny)
        return append_fused(short, remaining, x, context, weights, gone)

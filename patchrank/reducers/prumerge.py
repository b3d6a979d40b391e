"""PruMerge and PruMerge+: some patches stay, and each takes in what is like it.

Shapes: B images, N tokens, K patch tokens, R kept, D width, H heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, marked, most
from patchrank.reducers.groups import append_fused

RELEASED_NEIGHBOURS, RELEASED_PATCHES = 32, 576
"""Of LLaVA's pictures."""


@reducer(
    "prumerge",
    "PruMerge",
    place="middle",
    needs=("class token", "keys"),
    source="Shang et al., ICCV 2025 (LLaVA-PruMerge)",
    licence="released code Apache-2.0",
    differs="Released, the number of kept patches is that of outliers (above the third quartile by 1.5 interquartile "
    "ranges) and differs from picture to picture; here it is keep·K. Each takes in 32 others of 576 there, here the "
    "same share of K: 32 of 36 would be nearly all. It reads the last block there. `prumerge-plus` is its other form.",
)
class PruMerge(Keeping):
    """Keep the R patches of highest a, and add to each what is like it: x_i' = x_i + Σ_j a_j x_j over n others.

    a is the class token's attention with its heads taken as one: softmax of q·k/√D. The n are the patches with the
    most similar keys (cosine, all heads as one vector). One more token is Σ_j a_j x_j over all that go.

    neighbours: n; None: the released share of K, round(32/576·K), 11 of 196 patches and at least one.
    ValueError: no neighbour.
    """

    def __init__(self, keep: float, neighbours: int | None = None) -> None:
        super().__init__(keep)
        if neighbours is not None and neighbours < 1:
            raise ValueError(f"neighbours {neighbours} is below 1; leave it out for the released share, 32 of 576")
        self.neighbours = neighbours

    def near(self, patches: int) -> int:
        """n of ``patches``: all others at most."""
        share = max(1, round(RELEASED_NEIGHBOURS / RELEASED_PATCHES * int(patches)))  # a traced size is a tensor
        return min(share if self.neighbours is None else self.neighbours, int(patches) - 1)

    def left(self, patches: int) -> int:
        kept = super().left(patches)
        return kept + (kept < patches)

    def macs(self, call: Call) -> int:
        """The class token's row, keys that are not there yet, cosines of the kept with all, and the two sums."""
        kept = super().left(call.patches)
        if kept == call.patches:
            return 0
        return call.class_row + call.keys + (2 * kept + 1) * call.patches * call.width

    def chosen(self, attention: Tensor, count: int, context: ReductionContext) -> Tensor:
        """The places (long [B,R], ascending) of the patches that stay, by the attention [B,K] that they got."""
        return in_order(most(attention, count))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens in the order of their places, and one of all that go, at position -1."""
        patches = context.patches(x)
        tokens = patches.shape[1]
        count = super().left(tokens)
        if count == tokens:
            return x, context
        logits = replace(context, bias=None).class_logits()
        logits = logits.sum(1) * logits.shape[1] ** -0.5  # q·k/√D is the sum over heads by √H
        if context.bias is not None:  # once, not for every head
            logits = logits + F.pad(context.bias[:, 0, 0], (logits.shape[-1] - x.shape[1], 0))
        attention = context.patches(wide(logits).softmax(-1)[:, -x.shape[1] :])
        with torch.no_grad():
            kept = self.chosen(attention, count, context)
            keys = F.normalize(wide(context.patches(context.block_keys().transpose(1, 2).flatten(2))), dim=-1)
            likeness = products(keys.gather(1, kept[..., None].expand(-1, -1, keys.shape[-1])), keys)  # [B,R,K]
            likeness = likeness.scatter(2, kept[..., None], -torch.inf)  # a token is not its own neighbour
            near = likeness.topk(self.near(tokens), dim=-1).indices
            taken = torch.zeros_like(likeness).scatter(2, near, 1.0)
        weights = (taken * attention[:, None]).to(x.dtype)
        gone = ~marked(attention, kept)
        short, remaining = context.select(x, kept)
        short = remaining.with_patches(short, remaining.patches(short) + weights @ patches)
        return append_fused(short, remaining, x, context, attention, gone)


@reducer(
    "prumerge-plus",
    "PruMerge+",
    place="middle",
    needs=("class token", "keys"),
    source="Shang et al., ICCV 2025 (LLaVA-PruMerge)",
    licence="released code Apache-2.0",
    differs="Released, outliers are chosen as in `prumerge`, a share r of all, and every int(int(1/r)/3)-th patch "
    "joins them, the last patch aside. So about three patches by place come to one by attention. Here that is the "
    "ratio at every keep rate, with steps that need not be whole, and R is keep·K in every picture. Neighbours are as "
    "in `prumerge`. It reads the last block there.",
)
class PruMergePlus(PruMerge):
    """PruMerge with other patches that stay: three quarters of the R stand at even steps, the others get the most a.

    Those at even steps are the patches of ranks ⌊i·K/S⌋ by place, i = 0 to S - 1, S = 3R/4 rounded.
    """

    spatial = 0.75

    def chosen(self, attention: Tensor, count: int, context: ReductionContext) -> Tensor:
        """The places (long [B,R], ascending) of the patches at even steps, and of the most attended others."""
        tokens, even = attention.shape[1], round(self.spatial * int(count))
        steps = torch.arange(even, device=attention.device) * tokens // max(even, 1)
        spread = context.positions.argsort(dim=1, stable=True)[:, steps]
        attended = most(attention.masked_fill(marked(attention, spread), -torch.inf), count - even)
        return in_order(torch.cat([spread, attended], dim=1))

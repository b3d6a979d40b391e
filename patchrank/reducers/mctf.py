"""MCTF: pairs merge by three criteria, likeness, attention received and size, in both directions.

Shapes: B images, N tokens, K patch tokens, M merged, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Removing, spread
from patchrank.reducers.groups import merge_groups, numbered, sizes_of
from patchrank.reducers.tome import alternate

LEAST = 10
"""The tokens, class token included, below which a block merges none."""


@reducer(
    "mctf",
    "MCTF",
    place="middle",
    needs=("attention",),
    source="Lee et al., CVPR 2024 (MCTF)",
    licence="released code MIT",
    differs="Released, one step ahead: tokens merge before a block, by that block's own attention, which it then "
    "reuses merged instead of computing it again. Here they merge in the middle, after the block has attended.",
    build=spread(lambda removed, setting, block: MCTF(removed)),
)
class MCTF(Removing):
    """Merge M tokens between ToMe's sets A and B, half of them from A to B, the rest from B to A.

    Edges have W = W_sim^(1/τ_sim) · W_info^(1/τ_info) · W_size^(1/τ_size), where W_sim = (cos(x_i, x_j) + 1)/2,
    W_info = ā_i ā_j with ā the inverse of the attention that a token receives (mean over heads and queries, over its
    greatest), and W_size = s̄_i s̄_j with s̄ the inverse of its size likewise. A merged token is the mean weighted by
    attention received times size. At least ten tokens are left.

    tau_similarity, tau_attention, tau_size: the temperatures, 1, 20 and 40 as released.
    """

    def __init__(
        self,
        removed: int,
        tau_similarity: float = 1.0,
        tau_attention: float = 20.0,
        tau_size: float = 40.0,
        proportional: bool = True,
    ) -> None:
        super().__init__(removed)
        if min(tau_similarity, tau_attention, tau_size) <= 0:
            raise ValueError(
                f"a temperature of {tau_similarity}, {tau_attention}, {tau_size} is not above 0; 1, 20 and 40 are the "
                "released ones"
            )
        self.temperatures, self.proportional = (tau_similarity, tau_attention, tau_size), proportional

    def count(self, patches: int) -> int:
        return min(super().count(patches), max(0, patches + 1 - LEAST))

    def macs(self, call: Call) -> int:
        """The attention matrix, and half of the patches by the other half."""
        half = call.patches // 2
        return (call.attention + half * (call.patches - half) * call.width) if self.count(call.patches) else 0

    @torch.no_grad()
    def edges(self, x: Tensor, context: ReductionContext, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sets A and B (long [Ka], [Kb]), and the weights [B,Ka,Kb] of their edges. received: [B,K]."""
        a, b = alternate(context, received.shape[1], x.device)
        unit = F.normalize(wide(context.patches(x)), dim=-1)
        similarity, attention, size = (1 / temperature for temperature in self.temperatures)
        weights = ((products(unit[:, a], unit[:, b]) + 1) / 2) ** similarity
        for values, power in ((received, attention), (sizes_of(context), size)):
            # A token of size 0 (padding) gets no attention either; it must not decide the scale.
            inverse = 1 / values.where(values > 0, values.amax(1, keepdim=True))
            inverse = inverse / inverse.amax(1, keepdim=True)
            weights = weights * (inverse[:, a, None] * inverse[:, None, b]) ** power
        return a, b, weights

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer: what stays of A, then of B."""
        patches = x.shape[1] - context.leading - context.trailing
        merged = self.count(patches)
        if not merged:
            return x, context
        with torch.no_grad():
            received = context.patches(context.attention().mean((1, 2)))
            a, b, weights = self.edges(x, context, received)
            there, back = merged // 2, merged - merged // 2
            # 1. The best edges of A go to B.
            best, partner = weights.max(-1)
            going, staying = best.argsort(dim=1, descending=True, stable=True).tensor_split([there], dim=1)
            staying, into = staying.sort(1).values, partner.gather(1, going)
            # 2. The best edges of B, with what was merged into it, go to those of A that stay.
            kept = weights.gather(1, staying[..., None].expand(-1, -1, len(b)))
            best, partner = kept.max(1)
            leaving, stays = best.argsort(dim=1, descending=True, stable=True).tensor_split([back], dim=1)
            numbers = torch.arange(patches - merged, device=x.device)
            rest = staying.shape[1]
            of_b = numbered((leaving, partner.gather(1, leaving)), (stays, numbers[rest:]))
            a_stays, a_goes = (a[staying], numbers[:rest]), (a[going], of_b.gather(1, into))
            group = numbered(a_stays, a_goes, (b.expand(x.shape[0], -1), of_b))
            importance = received * sizes_of(context)
        return merge_groups(x, context, group, patches - merged, importance, self.proportional)

"""TCFormer's clustering: density peaks among k nearest neighbours.

Shapes: B images, N tokens, K patch tokens, R clusters, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, most
from patchrank.reducers.farthest import squared_distances
from patchrank.reducers.groups import merge_groups
from patchrank.reducers.kmedoids import assigned


def density_peaks(tokens: Tensor, count: int, neighbours: int) -> Tensor:
    """The cluster (long [B,K], below ``count``) of each token [B,K,F] around the density peaks of ``DPCKNN``.

    Clusters are numbered in the order of their centres' places.
    """
    squares = squared_distances(tokens) / tokens.shape[-1]
    nearest = squares.topk(min(neighbours, tokens.shape[1]), dim=-1, largest=False).values
    density = (-nearest.mean(-1)).exp()
    distances = squares.sqrt()
    # Of equal densities the earlier token counts as the denser.
    earlier = torch.ones_like(squares[0], dtype=torch.bool).tril(-1)
    equal = earlier & (density[:, None] == density[..., None])
    higher = (density[:, None] > density[..., None]).logical_or(equal)
    apart = distances.masked_fill(~higher, torch.inf).amin(-1)
    apart = apart.where(apart.isfinite(), distances.flatten(1).amax(1, keepdim=True))
    centres = in_order(most(density * apart, count))
    same = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return assigned(distances.masked_fill(same, -1), centres)


@reducer(
    "dpc-knn",
    "DPC-KNN (TCFormer)",
    source="Zeng et al., CVPR 2022 (TCFormer)",
    licence="the code of Haurum et al., 2023 (Which Tokens to Use?), from which the formula is, MIT",
    differs="Equal densities, which the released code breaks by noise, are broken by the tokens' order. Without its "
    "fine-tuning, channels of large values decide what is a centre: a warning rather than a baseline.",
)
class DPCKNN(Keeping):
    """Merge the patches into R clusters around density peaks, each the mean of its tokens.

    δ_ij = |x_i - x_j| / √D, density ρ_i = exp(-mean of the 5 smallest δ_ij², its own among them); a token's score is
    ρ_i times its distance to the nearest token of higher density; for the densest, times the largest distance between
    any two tokens of the picture, as released, so that it is always a centre. The R highest scores are centres, and
    every token joins the nearest.
    """

    neighbours = 5

    def macs(self, call: Call) -> int:
        """The distances between all pairs."""
        return call.patches**2 * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, in the order of the centres' places."""
        patches = context.patches(x)
        with torch.no_grad():
            count = self.left(patches.shape[1])
            cluster = density_peaks(patches, count, self.neighbours)
        return merge_groups(x, context, cluster, count)

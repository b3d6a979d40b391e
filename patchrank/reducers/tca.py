"""TCA's token condensation: attended patches stay, the next ones merge into four, the last fuse into one.

Shapes: B images, N tokens, K patch tokens, T = ⌈(1-r)K⌉, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, TokenReducer, marked, most
from patchrank.reducers.farthest import farthest, squared_distances
from patchrank.reducers.groups import append_fused, merge_groups
from patchrank.reducers.kmedoids import assigned
from patchrank.scores import keep_count

CENTRES = 4


def rate_for(keep: float, patches: int) -> float:
    """The rate r at which about the share ``keep`` of the patches is left: 3T - 2K + 3 tokens are, T = ⌈(1-r)K⌉."""
    kept = round((keep_count(keep, patches) + 2 * patches - 3) / 3)
    return 1 - (min(kept, patches - 1) - 0.5) / patches


def _build(setting: Setting) -> dict[Place, Reducer]:
    return {(setting.layer, "middle"): TokenCondensation(rate_for(setting.keep, setting.patches))}


@reducer(
    "tca",
    "TCA's condensation",
    place="middle",
    needs=("class token",),
    source="Wang et al., ICCV 2025 (Token Condensation as Adaptation)",
    licence="released code has no licence; nothing of it is here",
    differs="The first of the four centres is the most attended token; there it is drawn at random. Its reservoir of "
    "class tokens learns from the pictures that it has seen and is no reducer: it is not here. It stands at three "
    "places there (blocks 3, 6, 9).",
    build=_build,
    exceptions={"identity": "any rate above 0 takes tokens away"},
)
class TokenCondensation(TokenReducer):
    """Condense K patches at rate r, with T = ⌈(1-r)K⌉ and M = K + 1 - T.

    By the class token's attention a: the first T - 2M patches stay; the next 2M merge into 4; the last K - T fuse into
    Σ a_j x_j, not normalised. The four centres are chosen greedily, each the farthest from the others (Euclid); every
    token of the 2M joins the nearest centre c and counts 1/|x - c| in its mean, the centre itself 1.

    rate: r, 0.1 in the released setting.  ValueError: r outside (0, 1), or of so few patches that none would stay.
    """

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        if not 0 < rate < 1:
            raise ValueError(f"rate {rate} is not in (0, 1); it is the share that TCA merges or fuses at a place")
        self.rate = rate

    def split(self, patches: int) -> tuple[int, int, int]:
        """How many of ``patches`` stay, merge into four, and fuse into one. ValueError: see the class."""
        patches = int(patches)  # a traced size is a tensor
        kept = math.ceil((1 - self.rate) * patches)
        merging = 2 * (patches + 1 - kept)
        if kept - merging < 1 or merging < CENTRES:
            raise ValueError(
                f"rate {self.rate:.3g} of {patches} patches leaves {kept - merging} as they are and merges {merging} "
                f"into {CENTRES}; take more patches, or a rate between {1 / patches:.3g} and {1 / 3 - 1 / patches:.3g}"
            )
        return kept - merging, merging, patches - kept

    def left(self, patches: int) -> int:
        kept, _, fused = self.split(patches)
        return kept + CENTRES + (fused > 0)

    def macs(self, call: Call) -> int:
        """The class token's row, distances among the 2M, and the fused token."""
        _, merging, fused = self.split(call.patches)
        return call.class_row + (merging**2 + (fused > 0) * call.patches) * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with the tokens that stay, most attended first, then the four, then the fused one."""
        attention = context.class_attention()
        kept, merging, fused = self.split(attention.shape[1])
        order = most(attention, attention.shape[1])
        short, remaining = context.select(x, order[:, : kept + merging])
        with torch.no_grad():
            middle = remaining.patches(short)[:, kept:]
            distances = squared_distances(middle).sqrt()
            centres = farthest(distances, torch.zeros_like(order[:, 0]), CENTRES)
            same = torch.eye(merging, dtype=torch.bool, device=x.device)
            cluster = assigned(distances.masked_fill(same, -1), centres)
            centre = centres.gather(1, cluster)  # that of each token
            away = distances.gather(2, centre[..., None]).squeeze(-1)
            alone = centre == torch.arange(merging, device=x.device)
            weight = torch.where(alone, 1, 1 / away.clamp(min=1e-6))
            stays = torch.arange(kept, device=x.device).expand(x.shape[0], -1)
            group = torch.cat([stays, kept + cluster], dim=1)
            weights = torch.cat([torch.ones_like(stays, dtype=weight.dtype), weight], dim=1)
        short, remaining = merge_groups(short, remaining, group, kept + CENTRES, weights)
        if not fused:
            return short, remaining
        gone = marked(attention, order[:, kept + merging :])
        return append_fused(short, remaining, x, context, attention, gone)

"""DiffRate: every block prunes to one number of tokens and merges to another, both learned once and published.

Shapes: B images, N tokens, K patch tokens, P after pruning, R after merging, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, TokenReducer, most
from patchrank.reducers.groups import grouped_sum, log_sizes, merge_groups, numbered, sizes_of

SCHEDULES = {
    8.7: (
        (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
        (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
    ),
    10.0: (
        (197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3),
        (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3),
    ),
    10.4: (
        (197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3),
        (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3),
    ),
    11.5: (
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
    12.5: (
        (197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3),
        (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3),
    ),
}
"""The released numbers for DeiT-B by its GFLOPs: tokens, class token included, after pruning and after merging."""
_BLOCKS, _PATCHES = 12, 196
_LEAST = 2.0**-14  # a size whose logarithm every precision has


def nearest(setting: Setting) -> float:
    """The GFLOPs of the schedule whose mean share of tokens is nearest to that of pruning to ``keep`` at ``layer``."""
    share = (setting.layer + setting.keep * (setting.blocks - setting.layer)) / setting.blocks
    return min(SCHEDULES, key=lambda gflops: abs(sum(SCHEDULES[gflops][1]) / (_BLOCKS * (_PATCHES + 1)) - share))


def schedule(setting: Setting) -> dict[Place, Reducer]:
    """The reducers of the ``nearest`` released schedule.

    A tower of other depth or other numbers of patches has the same shares at the same relative depths. Numbers never
    rise from block to block.
    """
    pruned, merged = SCHEDULES[nearest(setting)]
    places: dict[Place, Reducer] = {}
    patches = setting.patches
    for block in range(setting.blocks):
        at = block * _BLOCKS // setting.blocks
        after = [max(1, round((count[at] - 1) / _PATCHES * setting.patches)) for count in (pruned, merged)]
        prune, merge = min(after[0], patches), min(after[1], after[0], patches)
        if merge < patches:
            places[block, "middle"] = DiffRate(prune, merge)
        patches = merge
    return places


@reducer(
    "diffrate",
    "DiffRate",
    place="middle",
    needs=("class token",),
    source="Chen et al., ICCV 2023 (DiffRate)",
    licence="released code has no licence; nothing of it is here",
    differs="The released schedules for DeiT-B serve every tower; the keep rate chooses the nearest of the five, and "
    "the layer is not read: in 12 blocks they begin in the second, that of 11.5 G in the third. MAE's released "
    "schedules are not here, nor is the search, a training of its own. Where cosines below 0 would make a size 0 or "
    "less, which has no logarithm, it counts as 1/16384 of a patch.",
    build=schedule,
    same=nearest,
    exceptions={"identity": "its schedules all lose tokens"},
)
class DiffRate(TokenReducer):
    """Sort the patches by the class token's attention, keep P of them, and merge the last P - R into the first R.

    Each of the last joins the most similar of the first, by the cosine of the tokens. A merged token is the plain mean
    of its parts, and its size, by which later attention counts it, grows by size times cosine, as released.

    pruned: P.  merged: R.  ValueError: not 1 <= R <= P.
    """

    def __init__(self, pruned: int, merged: int) -> None:
        super().__init__()
        if not 1 <= merged <= pruned:
            raise ValueError(f"{pruned} tokens after pruning and {merged} after merging; merging cannot add any")
        self.pruned, self.merged = pruned, merged

    def left(self, patches: int) -> int:
        return min(self.merged, patches)

    def macs(self, call: Call) -> int:
        """The class token's row, and the cosines of those that merge with the others."""
        merged = self.left(call.patches)
        return call.class_row + (min(self.pruned, call.patches) - merged) * merged * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first."""
        attention = context.class_attention().detach()
        pruned = min(self.pruned, attention.shape[1])
        merged = self.left(attention.shape[1])
        x, context = context.select(x, most(attention, pruned))
        if merged == pruned:
            return x, context
        with torch.no_grad():
            unit = F.normalize(wide(context.patches(x)), dim=-1)
            cosine, into = products(unit[:, merged:], unit[:, :merged]).max(-1)
            places = torch.arange(pruned, device=x.device).expand(x.shape[0], -1)
            group = numbered((places[:, :merged], places[0, :merged]), (places[:, merged:], into))
            sizes = sizes_of(context)
            soft = torch.cat([sizes[:, :merged], sizes[:, merged:] * cosine], dim=1)
            soft = grouped_sum(soft[..., None], group, merged).squeeze(-1).clamp(min=_LEAST)
        x, context = merge_groups(x, context, group, merged, torch.ones_like(sizes), proportional=True)
        return x, replace(context, sizes=soft, bias=log_sizes(context, x, soft))

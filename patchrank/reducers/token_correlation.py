"""Token-correlation selection: attended patches stay, half of them where attention stands out, repeated ones last.

Shapes: B images, N tokens, K patch tokens, R kept, D width, H heads, g patches a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, marked, most
from patchrank.reducers.farthest import cosines


def repeated(keys: Tensor, attention: Tensor, threshold: float) -> Tensor:
    """bool [B,K]: the tokens like which there is a more attended one, by a cosine of keys [B,K,F] above ``threshold``.

    attention: [B,K]; of equally attended tokens the first counts as more attended.
    """
    rank = most(attention, attention.shape[1]).argsort(-1)
    ahead = rank[:, None] < rank[:, :, None]  # [B,i,j]: j is more attended than i
    return ((cosines(keys) > threshold) & ahead).any(-1)


def contrast(attention: Tensor, positions: Tensor, grid: int, window: int) -> Tensor:
    """A token's attention over the mean of its neighbours', [B,K].

    attention: [B,K].  positions: long [B,K], places in the grid; tokens at -1, and those without neighbours, are
    compared with the mean of all tokens.  window: the side of the square of neighbours, an odd number of patches.
    """
    row, column = positions // grid, positions % grid
    reach, placed = window // 2, positions >= 0
    near = (row[:, :, None] - row[:, None]).abs().le(reach) & (column[:, :, None] - column[:, None]).abs().le(reach)
    near = near & placed[:, :, None] & placed[:, None]
    near = near & ~torch.eye(attention.shape[1], dtype=torch.bool, device=attention.device)
    count = near.sum(-1)
    around = (near * attention[:, None]).sum(-1) / count.clamp(min=1)
    around = around.where(count > 0, attention.mean(1, keepdim=True))
    return attention / around.clamp(min=torch.finfo(attention.dtype).tiny)


def best(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """The places (long [B,count]) of the highest scores [B,K] in the lowest groups: long [B,K]."""
    order = most(scores, scores.shape[1])
    return order.gather(1, group.gather(1, order).argsort(dim=-1, stable=True))[:, :count]


def _build(setting: Setting) -> dict[Place, Reducer]:
    return {(setting.layer, "middle"): TokenCorrelation(setting.keep, setting.grid)}


@reducer(
    "token-correlation",
    "token correlation",
    place="middle",
    needs=("class token", "keys", "places"),
    source="Zhang et al., 2024 (Token-level Correlation-guided Compression), from its abstract",
    licence="no code was released",
    differs="There the share of repeated tokens sets how many of a tile stay, and tokens are drawn by attention; its "
    "constants are not published. Here keep sets the number, repeated tokens stay behind all others, and nothing is "
    "drawn. All three constants are ours: on val of scenes of shape, at keep 0.7, 0.5 and 0.3, the cosine 0.9 was the "
    "best of 0.7, 0.8, 0.9 and 1; shares from 0 to 0.75 and windows of 3 and 5 differed by less than half a point.",
    build=_build,
    exceptions={"levels": "the tokens of a level have no places in a square grid"},
)
class TokenCorrelation(Keeping):
    """Keep R patches: round(local·R) whose attention most exceeds their neighbours', then those of most attention.

    Attention is a, the class token's in this block, mean over heads. The local choice is by a_j over the mean a of the
    patches around j. A patch is repeated if a more attended one has a key of cosine above the threshold (keys averaged
    over heads); in both choices repeated patches come after all others. Kept tokens stay in the order of their places.

    grid: g.  threshold: cosine above which a key repeats another.  local: share of R that is chosen by contrast.
    window: side of the neighbourhood in patches, an odd number.
    ValueError: a share outside [0, 1], a cosine outside [-1, 1] or an even window.
    """

    def __init__(self, keep: float, grid: int, threshold: float = 0.9, local: float = 0.5, window: int = 3) -> None:
        super().__init__(keep)
        if not 0 <= local <= 1:
            raise ValueError(f"local {local} is not in [0, 1]; it is a share of the patches that stay")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold {threshold} is no cosine; give one in [-1, 1]")
        if window < 3 or window % 2 == 0:
            raise ValueError(f"window {window} has no patch in its middle, or no neighbours; give 3, 5, ...")
        self.grid, self.threshold, self.local, self.window = grid, threshold, local, window

    def macs(self, call: Call) -> int:
        """The class token's row, keys that are not there yet, and the cosines of all pairs."""
        if self.left(call.patches) == call.patches:
            return 0
        return call.class_row + call.keys + call.patches**2 * call.width // call.heads

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        tokens = context.positions.shape[1]
        count = self.left(tokens)
        if count == tokens:
            return x, context
        with torch.no_grad():
            attention = context.class_attention()
            behind = repeated(context.patches(context.block_keys().mean(1)), attention, self.threshold).long()
            local = round(self.local * count)
            apart = contrast(attention, context.positions, self.grid, self.window)
            chosen = best(apart, behind, local)
            rest = best(attention, behind + 2 * marked(attention, chosen), count - local)
            kept = in_order(torch.cat([chosen, rest], dim=1))
        return context.select(x, kept)

"""Budgets of patch tokens over the tiles of a large picture: HiRED's, GlobalCom²'s, and an even one as control.

Shapes: B images, m tiles a side, V = 1 + m² views of a picture (thumbnail first), K patch tokens of a view, g patches a
side, R kept of all V·K, H heads, D width. ``common.tiles`` cuts the pictures, and joins what is kept in one sequence.

A budget says how many tokens the thumbnail keeps, how many all tiles together, and each tile's share of those. Both
papers round every tile's share down, so that their numbers of tokens differ between pictures. Here they sum to the same
total in all pictures (Webster's method of apportionment, ``apportioned``), so shapes are static and costs exact.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import wide
from common.reducer_registry import Setting, at, reducer
from common.reduction import Place, Reducer, ReductionContext
from common.tiles import join, of_thumbnails
from patchrank.reducers.base import Call, Keeping, TokenReducer, in_order, marked, most
from patchrank.scores import keep_count

ALPHA = 0.5
"""HiRED's α, the thumbnail's part of the budget, as its released code runs."""
TEMPERATURE = 10.0
"""GlobalCom²'s temperature of the softmax over tiles, as released."""


def areas(grid: int, tiles: int) -> Tensor:
    """How much of each thumbnail's patch a tile shows, in parts of which a patch has m²: long [m²,K].

    An edge between tiles may run through patches. All tiles show as much.
    """
    patch, tile = torch.arange(grid) * tiles, torch.arange(tiles)[:, None] * grid  # where they begin
    shown = (torch.minimum(patch + tiles, tile + grid) - torch.maximum(patch, tile)).clamp(min=0)  # [m,g]
    return (shown[:, None, :, None] * shown[None, :, None]).flatten(2).flatten(0, 1)


def apportioned(scores: Tensor, quotas: Tensor, total: int) -> Tensor:
    """The places (long [B,total], ascending) among the m²·K tokens of the tiles that their quotas keep.

    scores: [B,m²,K], by which a tile keeps its tokens.  quotas: [B,m²], what tiles should keep, up to a common factor.
    A tile's j-th token (from 0) has its turn at (j + 1/2) / quota; the first ``total`` turns are kept. These are the
    quotas to scale, rounded to the nearest. What exceeds a tile's K goes to the others, to tiles without a quota last.
    """
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    turn = (rank + 0.5) / wide(quotas).clamp(min=1e-6)[..., None]
    return in_order(most(-turn.flatten(1), total))


class TileBudget(TokenReducer):
    """Keep a budget of the patch tokens of all views of a picture, and join them in one sequence.

    keep: the share of the V·K tokens.  tiles: m.  grid: g.  ValueError: a rate outside (0, 1].
    """

    def __init__(self, keep: float, tiles: int, grid: int) -> None:
        super().__init__()
        keep_count(keep, 1)
        self.keep, self.tiles, self.grid = keep, tiles, grid

    @classmethod
    def of(cls, setting: Setting) -> dict[Place, Reducer]:
        """This budget after block ``layer``."""
        return {at(setting.layer, "after"): cls(setting.keep, setting.tiles, setting.grid)}

    @abstractmethod
    def counts(self, patches: int) -> tuple[int, int]:
        """How many of K patches the thumbnail keeps, and how many all tiles do."""

    @abstractmethod
    def shares(self, context: ReductionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the thumbnail's tokens [B,K] and of the tiles' [B,m²,K], and the tiles' quotas [B,m²]."""

    def left(self, patches: int) -> int:
        return sum(self.counts(patches))

    def macs(self, call: Call) -> int:
        """The class token's row of attention in every view; ``call`` is of one view."""
        return (1 + self.tiles**2) * call.class_row

    def views(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """values [B·V,K] -> those of the thumbnail [B,K] and of the tiles [B,m²,K]."""
        values = values.unflatten(0, (-1, 1 + self.tiles**2))
        return values[:, 0], values[:, 1:]

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B·V,N,D] -> [B,P+R,D], the thumbnail's leading tokens first, and the context of one sequence a picture."""
        whole, parts, quotas = self.shares(context)
        first, others = self.counts(self.grid**2)
        kept = [in_order(most(whole, first)), self.grid**2 + apportioned(parts, quotas, others)]
        return join(x, context, torch.cat(kept, dim=1), tiles=self.tiles)


class EvenTiles(TileBudget):
    """Every view keeps the same share of its tokens, those to which its class token attends most: the control."""

    def counts(self, patches: int) -> tuple[int, int]:
        return keep_count(self.keep, patches), self.tiles**2 * keep_count(self.keep, patches)

    def shares(self, context: ReductionContext) -> tuple[Tensor, Tensor, Tensor]:
        whole, parts = self.views(context.class_attention())
        return whole, parts, torch.ones_like(parts[..., 0])


class HiREDTiles(TileBudget):
    """HiRED: of T = int(V·K·keep) the thumbnail keeps int(α·T), and a tile by how much of the thumbnail falls to it.

    A tile's quota is how many of the thumbnail's int((1-α)·K) most attended patches lie in its area, by the class
    token's attention in the first block. Inside every view tokens are kept by the attention of the block of this place.
    """

    def counts(self, patches: int) -> tuple[int, int]:
        total = max(1, int((1 + self.tiles**2) * patches * self.keep))
        first = min(int(total * ALPHA), patches)
        return first, min(total - first, self.tiles**2 * patches)

    def shares(self, context: ReductionContext) -> tuple[Tensor, Tensor, Tensor]:
        whole, parts = self.views(context.class_attention())
        early = whole if context.noted is None else context.noted
        top = marked(early, most(early, int(self.grid**2 * (1 - ALPHA))))
        area = areas(self.grid, self.tiles).to(top.device)
        return whole, parts, (top[:, None] * area).sum(-1).to(whole)

    @classmethod
    def of(cls, setting: Setting) -> dict[Place, Reducer]:
        """Behind the first block, where it is not itself there, it notes that block's attention."""
        noted = {at(0, "after"): NotedAttention(setting.tiles)} if setting.layer else {}
        return noted | super().of(setting)


class NotedAttention(TokenReducer):
    """Note the class token's attention to the thumbnail's patches in this block for a later one; no token goes."""

    def __init__(self, tiles: int) -> None:
        super().__init__()
        self.tiles = tiles

    def left(self, patches: int) -> int:
        return patches

    def macs(self, call: Call) -> int:
        """The thumbnail's row; ``call`` is of one view."""
        return call.class_row

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x as it is, and the context with ``noted`` [B,K]."""
        return x, replace(context, noted=of_thumbnails(context, self.tiles).class_attention())


class GlobalCom2Tiles(TileBudget):
    """GlobalCom²: the thumbnail keeps int(keep·K), a tile K·min(1, keep·(1 + σ_i - mean σ)), σ = softmax(g / 10).

    g_i sums the thumbnail's scores over the area of tile i. A tile keeps its tokens by its own scores plus those of the
    thumbnail, interpolated bilinearly to the tiles' resolution, both of length 1 in the tile. Scores are as in
    ``GlobalCom2``.
    """

    def counts(self, patches: int) -> tuple[int, int]:
        return max(1, int(patches * self.keep)), max(1, int(self.tiles**2 * patches * self.keep))

    def shares(self, context: ReductionContext) -> tuple[Tensor, Tensor, Tensor]:
        whole, parts = self.views(class_scores(context))
        area, grid = areas(self.grid, self.tiles).to(whole), self.grid
        weight = ((whole[:, None] * area).sum(-1) / self.tiles**2 / TEMPERATURE).softmax(-1)
        quotas = (self.keep * (1 + weight - weight.mean(-1, keepdim=True))).clamp(max=1)
        fine = F.interpolate(whole.view(-1, 1, grid, grid), scale_factor=self.tiles, mode="bilinear")[:, 0]
        fine = fine.unflatten(2, (self.tiles, grid)).unflatten(1, (self.tiles, grid)).transpose(2, 3)
        fine = fine.flatten(3).flatten(1, 2)  # [B,m²,K]
        return whole, F.normalize(parts, dim=-1) + F.normalize(fine, dim=-1), quotas

    def macs(self, call: Call) -> int:
        """The rows of all views, and 4 per value of the interpolated map."""
        return super().macs(call) + 4 * self.tiles**2 * call.patches


def class_scores(context: ReductionContext) -> Tensor:
    """The class token's attention logits to the patch tokens in this block, mean over heads: [B,K]."""
    logits = wide(context.class_logits()).mean(1)
    return context.patches(logits[:, -context.entered.shape[1] :])


@reducer(
    "globalcom2",
    "GlobalCom²",
    place="after",
    needs=("class token",),
    source="Liu et al., 2025 (GlobalCom²)",
    licence="released code Apache-2.0",
    tiled=GlobalCom2Tiles.of,
    differs="It stands in the last block there, behind which a CLIP tower has nothing left to save. Over tiles, shares "
    "are rounded so that all pictures keep the same number; there each is rounded down.",
)
class GlobalCom2(Keeping):
    """Keep the int(keep·K) patches of the highest class logits: q·k/√d of the class token, mean over heads.

    They are those of this block, before the softmax. In tiles this is the thumbnail's part; each tile has a share of
    its own, K·min(1, keep·(1 + σ_i - mean σ)) with σ = softmax(g / 10), where g_i sums the thumbnail's logits over the
    tile's area. It keeps tokens by its own logits plus the thumbnail's, each of length 1 in the tile.
    """

    def left(self, patches: int) -> int:
        return max(1, int(self.keep * patches))

    def macs(self, call: Call) -> int:
        """The class token's row of logits."""
        return call.class_row

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, highest logits first."""
        scores = class_scores(context)
        return context.select(x, most(scores, self.left(scores.shape[1])))

"""What Patch Ranking is compared with: token reducers that need no training, each from its paper's formulas.

Shapes: B images, K patch tokens, R kept, M merged (those of set A that go), N all tokens, D width, H heads.

Each is a reducer of ``common.reduction`` with a fixed number of tokens out, which makes shapes static. ``keep`` is the
share of the patch tokens present that stays (``keep_count``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.reduction import ReductionContext
from patchrank.avit import AViTTower
from patchrank.scores import keep_count

__all__ = ["AViTTower", "ClassAttention", "EViT", "GoldenOracle", "RandomKeep", "ToMe", "match"]

_PLACES = 2**14  # of RandomKeep's table: a grid of 128 x 128


class ClassAttention(nn.Module):
    """Keep the patches to which the class token attends most, mean over heads, in the block where this stands.

    Before block i as in the paper's comparison (there i = 3, its 4th block), or between that block's half steps.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first."""
        attention = context.class_attention()
        return context.select(x, attention.topk(keep_count(self.keep, attention.shape[1]), dim=1).indices)


class RandomKeep(nn.Module):
    """Keep patches drawn at random: by ``seed`` alone, the same places of the grid in every picture.

    So neither the batch nor the order of the pictures changes a result, and several seeds tell the spread.
    """

    def __init__(self, keep: float, seed: int = 0) -> None:
        super().__init__()
        self.keep = keep
        rank = torch.rand(_PLACES, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rank", rank, persistent=False)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        rank = self.rank[context.positions]
        return context.select(x, rank.topk(keep_count(self.keep, rank.shape[1]), dim=1).indices)


class GoldenOracle(nn.Module):
    """Keep the first patches of golden orders [B,N] of this very batch: what a perfect predictor would keep.

    It stands before the layer that the orders were made for, as the first reducer of its tower.
    """

    def __init__(self, keep: float, order: Tensor) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens. ValueError: orders of another batch or another grid."""
        if self.order.shape != context.positions.shape:
            raise ValueError(
                f"orders {tuple(self.order.shape)} do not fit {tuple(context.positions.shape)} patch tokens; "
                "give the golden orders of this batch, and no other reducer before"
            )
        return context.select(x, self.order[:, : keep_count(self.keep, self.order.shape[1])])


class EViT(nn.Module):
    """Keep the patches to which the class token attends most, and fuse the others into one (Liang et al., ICLR 2022).

    It stands between the half steps of a block and reads that block's attention. The fused token is the mean of the
    dropped ones weighted by attention. (The paper calls it an average and writes the sum; without training, only an
    average has the scale of a token.) fuse=False drops them.
    """

    def __init__(self, keep: float, fuse: bool = True) -> None:
        super().__init__()
        self.keep, self.fuse = keep, fuse

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first, and the fused one, of position -1.

        ValueError: after a reducer whose attention is proportional to sizes, which EViT does not know.
        """
        if context.bias is not None:
            raise ValueError("EViT does not follow a reducer with proportional attention; turn that off")
        attention = context.class_attention()
        kept = attention.topk(keep_count(self.keep, attention.shape[1]), dim=1).indices
        short, remaining = context.select(x, kept)
        if not self.fuse or kept.shape == attention.shape:
            return short, remaining
        dropped = attention.scatter(1, kept, 0.0)
        weights = dropped / dropped.sum(1, keepdim=True).clamp(min=torch.finfo(dropped.dtype).tiny)
        fused = weights.to(x.dtype)[:, None] @ context.patches(x)
        sizes = _sizes(context)
        left = sizes.scatter(1, kept, 0.0).sum(1, keepdim=True)
        x = remaining.with_patches(short, torch.cat([remaining.patches(short), fused], dim=1))
        positions = F.pad(remaining.positions, (0, 1), value=-1)
        return x, replace(remaining, positions=positions, sizes=torch.cat([sizes.gather(1, kept), left], dim=1))


def match(keys: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's bipartite soft matching of tokens by their keys [B,K,D].

    Every second token (set A) draws an edge to the token of the others (set B) with the most similar key, by cosine;
    the ``merged`` best edges stay. Gives, as places within A and B: the tokens of A that stay (in their order, long
    [B,ceil(K/2)-M]), those that go ([B,M]), and the tokens of B that these go to ([B,M]).
    """
    keys = F.normalize(keys, dim=-1)
    closeness, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)
    order = closeness.argsort(dim=1, descending=True)
    going, staying = order.tensor_split([merged], dim=1)
    return staying.sort(1).values, going, partner.gather(1, going)


class ToMe(nn.Module):
    """Merge the ``removed`` most similar pairs of patches in a block (Bolya et al., ICLR 2023).

    It stands between the half steps, usually of every block, and compares the keys of that block's attention, their
    mean over heads. A merged token is the mean of its patches, so tokens count by their sizes. The class token never
    merges, and at most half of the patches do.
    proportional: later blocks attend to a token as to the patches that it stands for: log sizes added to the logits.
    """

    def __init__(self, removed: int, proportional: bool = True) -> None:
        super().__init__()
        if removed < 0:
            raise ValueError(f"removed {removed} is negative; it is the number of tokens that a block loses")
        self.removed, self.proportional = removed, proportional

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens less; those that stand for several have position -1."""
        assert context.keys is not None, "ToMe reads a block's keys: it stands at (i, 'middle')"
        patches, positions = context.patches(x), context.positions
        merged = min(self.removed, patches.shape[1] // 2)
        if not merged:
            return x, context
        sizes = _sizes(context)
        staying, going, partner = match(context.patches(context.keys.mean(1)), merged)

        def join(values: Tensor) -> Tensor:
            """values [B,K,F] -> [B,K-M,F]: those of A that stay, then B with what came to it added."""
            a, b = values[:, ::2], values[:, 1::2]
            rows = [places[..., None].expand(-1, -1, values.shape[-1]) for places in (staying, going, partner)]
            return torch.cat([a.gather(1, rows[0]), b.scatter_add(1, rows[2], a.gather(1, rows[1]))], dim=1)

        weights = sizes[..., None].to(x.dtype)
        joined = join(weights)
        x = context.with_patches(x, join(patches * weights) / joined)
        # Where no other patch came in, a sum of positions is still a position.
        alone = join(torch.ones_like(positions)[..., None]) == 1
        positions = join(positions[..., None]).where(alone, -1).squeeze(-1)
        bias = _log_sizes(context, x, joined) if self.proportional else context.bias
        return x, replace(context, positions=positions, sizes=joined.squeeze(-1), bias=bias)


def _sizes(context: ReductionContext) -> Tensor:
    """How many patches each token stands for, [B,K] in fp32."""
    return torch.ones_like(context.positions, dtype=torch.float32) if context.sizes is None else context.sizes


def _log_sizes(context: ReductionContext, x: Tensor, sizes: Tensor) -> Tensor:
    """The attention bias [B,1,1,N] of proportional attention: log sizes [B,K,1] of patches, 0 for exempt tokens."""
    every = context.with_patches(x.new_ones(*x.shape[:2], 1), sizes)
    return every.log()[:, None, None, :, 0]

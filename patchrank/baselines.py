"""Baselines of Patch Ranking: token reducers that need no training, each from its paper's formulas.

Shapes: B images, K patch tokens, R kept, M merged (those of set A that go), N all tokens, D width, H heads.

Each is a reducer of ``common.reduction`` that leaves a fixed number of tokens, so shapes are static. ``keep`` is the
share of the present patch tokens that stay (``keep_count``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.reduction import ReductionContext
from patchrank.avit import AViTTower
from patchrank.scores import keep_count

__all__ = ["AViTTower", "ClassAttention", "EViT", "GoldenOracle", "RandomKeep", "ToMe", "bipartite_soft_matching"]

_PLACES = 2**14  # in the table of RandomKeep: a grid of 128 x 128


class ClassAttention(nn.Module):
    """Keep the patches to which the class token attends most, mean over heads, in the block where this stands.

    It stands before block i, as in the paper's comparison (i = 3 there, the 4th block), or between its half steps.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first."""
        attention = context.class_attention()
        return context.select(x, attention.topk(keep_count(self.keep, attention.shape[1]), dim=1).indices)


class RandomKeep(nn.Module):
    """Keep random patches, the same places of the grid in every image.

    Only ``seed`` chooses them, so a result depends neither on the batch nor on the order of the images, and several
    seeds give the spread.
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
    """Keep the first patches of the golden orders [B,K] of this batch, as a perfect predictor would.

    It stands before the layer for which the orders were made, as the first reducer of its tower.
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

    It stands between the half steps of a block and reads that block's attention. The fused token is the
    attention-weighted mean of the dropped ones. (The paper calls it an average and writes a sum; without training,
    only an average has the scale of a token.) With fuse=False they are dropped.
    """

    def __init__(self, keep: float, fuse: bool = True) -> None:
        super().__init__()
        self.keep, self.fuse = keep, fuse

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first, and the fused one, of position -1.

        ValueError: an earlier reducer uses proportional attention, which EViT does not support.
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
        fused = weights.to(x.dtype)[:, None] @ context.patches(x)  # [B,1,D]
        # The fused token comes last and stands for all the patches of the dropped ones.
        x = remaining.with_patches(short, torch.cat([remaining.patches(short), fused], dim=1))
        positions = F.pad(remaining.positions, (0, 1), value=-1)
        sizes = _sizes(context)
        fused_size = sizes.scatter(1, kept, 0.0).sum(1, keepdim=True)
        centres = remaining.centres
        if centres is not None:
            fused_centre = weights.to(centres.dtype)[:, None] @ context.centres
            centres = torch.cat([centres, fused_centre], dim=1)
        sizes = torch.cat([sizes.gather(1, kept), fused_size], dim=1)
        return x, replace(remaining, positions=positions, sizes=sizes, centres=centres)


def bipartite_soft_matching(keys: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's bipartite soft matching of tokens by their keys [B,K,D].

    Tokens alternate between sets A and B. Every token of A draws an edge to the token of B with the most similar key,
    by cosine, and the ``merged`` best edges are kept. Returns places within A and B: the tokens of A that stay (in
    their order, long [B,ceil(K/2)-M]), those that go ([B,M]), and the tokens of B into which these go ([B,M]).
    """
    keys = F.normalize(keys, dim=-1)
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)
    order = similarity.argsort(dim=1, descending=True)
    going, staying = order.tensor_split([merged], dim=1)
    return staying.sort(1).values, going, partner.gather(1, going)


class ToMe(nn.Module):
    """Merge the ``removed`` most similar pairs of patches in a block (Bolya et al., ICLR 2023).

    It stands between the half steps, usually of every block, and compares the keys of that block's attention,
    averaged over heads. A merged token is the mean of its patches, so tokens are weighted by size. The class token
    never merges, and at most half of the patches do.
    proportional: later blocks attend to a token as to all its patches: log sizes are added to the logits.
    """

    def __init__(self, removed: int, proportional: bool = True) -> None:
        super().__init__()
        if removed < 0:
            raise ValueError(f"removed {removed} is negative; it is the number of tokens that a block loses")
        self.removed, self.proportional = removed, proportional

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer; tokens that stand for several patches have position -1."""
        assert context.keys is not None, "ToMe reads a block's keys: it stands at (i, 'middle')"
        patches, positions = context.patches(x), context.positions
        merged = min(self.removed, patches.shape[1] // 2)
        if not merged:
            return x, context
        sizes = _sizes(context)
        staying, going, partner = bipartite_soft_matching(context.patches(context.keys.mean(1)), merged)

        def join(values: Tensor) -> Tensor:
            """values [B,K,F] -> [B,K-M,F]: the staying ones of A, then those of B plus the ones that go into them."""
            a, b = values[:, ::2], values[:, 1::2]
            rows = [places[..., None].expand(-1, -1, values.shape[-1]) for places in (staying, going, partner)]
            return torch.cat([a.gather(1, rows[0]), b.scatter_add(1, rows[2], a.gather(1, rows[1]))], dim=1)

        # Means weighted by size.
        weights = sizes[..., None].to(x.dtype)
        joined = join(weights)
        x = context.with_patches(x, join(patches * weights) / joined)
        # A token that nothing was merged into keeps its position.
        alone = join(torch.ones_like(positions)[..., None]) == 1
        positions = join(positions[..., None]).where(alone, -1).squeeze(-1)
        centres = None if context.centres is None else join(context.centres * weights) / joined
        bias = _log_sizes(context, x, joined) if self.proportional else context.bias
        return x, replace(context, positions=positions, sizes=joined.squeeze(-1), centres=centres, bias=bias)


def _sizes(context: ReductionContext) -> Tensor:
    """The number of patches that each token stands for, [B,K] in fp32."""
    return torch.ones_like(context.positions, dtype=torch.float32) if context.sizes is None else context.sizes


def _log_sizes(context: ReductionContext, x: Tensor, sizes: Tensor) -> Tensor:
    """The bias [B,1,1,N] of proportional attention from the patches' sizes [B,K,1]: their logs; 0 for exempt tokens."""
    all_sizes = context.with_patches(x.new_ones(*x.shape[:2], 1), sizes)
    return all_sizes.log()[:, None, None, :, 0]

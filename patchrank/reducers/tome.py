"""ToMe: the most similar pairs of tokens merge, a few in every block.

Shapes: B images, K patch tokens, M merged (those of set A that go), N all tokens, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Removing, marked, most, spread
from patchrank.reducers.groups import merge_groups, numbered


def alternate(context: ReductionContext, patches: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The places of ToMe's sets A and B among the patches: tokens alternate, and the first token of all is in A.

    Behind one class token, A is the odd patches (1, 3, ...) and B the even ones; without one it is the other way.
    """
    places, first = torch.arange(patches, device=device), context.leading % 2
    return places[first::2], places[1 - first :: 2]


def bipartite_soft_matching(a: Tensor, b: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's bipartite soft matching of tokens A [B,Ka,D] to tokens B [B,Kb,D] by their keys.

    Every token of A draws an edge to the token of B with the most similar key, by cosine, and the ``merged`` best
    edges are kept. Returns places within A and B: the tokens of A that stay (in their order, long [B,Ka-M]), those
    that go ([B,M]), and the tokens of B into which these go ([B,M]).
    """
    similarity, partner = products(F.normalize(wide(a), dim=-1), F.normalize(wide(b), dim=-1)).max(-1)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    going, staying = order.tensor_split([merged], dim=1)
    return staying.sort(1).values, going, partner.gather(1, going)


def pairs(context: ReductionContext, metric: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's groups of the patches by their metric [B,K,F] -> group (long [B,K]), the places that go, their groups.

    The groups are the staying tokens of A in their order, then those of B; there are K - M.
    """
    a, b = alternate(context, metric.shape[1], metric.device)
    staying, going, partner = bipartite_soft_matching(metric[:, a], metric[:, b], merged)
    kept = staying.shape[1]
    numbers = torch.arange(kept + len(b), device=metric.device)
    into = kept + partner
    group = numbered((a[staying], numbers[:kept]), (b.expand(metric.shape[0], -1), numbers[kept:]), (a[going], into))
    return group, a[going], into


@reducer(
    "tome",
    "ToMe",
    place="middle",
    needs=("keys",),
    source="Bolya et al., ICLR 2023 (ToMe)",
    licence="released code CC-BY-NC-4.0; nothing of it is here",
    differs="One number of merges serves all blocks, so many that as many tokens are gone over them as when pruning.",
    build=spread(lambda removed, setting, block: ToMe(removed)),
)
class ToMe(Removing):
    """Merge the ``removed`` most similar pairs of patches in a block: each is the mean of its patches, by size.

    It stands between the half steps, usually of every block, and compares the keys of that block's attention,
    averaged over heads. Tokens alternate between the sets A and B, the class token being the first of A, as released;
    it never merges, and at most half of the patches do.
    proportional: later blocks attend to a token as to all its patches: log sizes are added to the logits.
    """

    def __init__(self, removed: int, proportional: bool = True) -> None:
        super().__init__(removed)
        self.proportional = proportional

    def macs(self, call: Call) -> int:
        """The products of mean keys; half of the patches by the other half."""
        return _matching(call, self.count(call.patches))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer; tokens that stand for several patches have position -1."""
        patches = x.shape[1] - context.leading - context.trailing
        merged = self.count(patches)
        if not merged:
            return x, context
        with torch.no_grad():
            group, _, _ = pairs(context, context.patches(context.block_keys().mean(1)), merged)
        return merge_groups(x, context, group, patches - merged, proportional=self.proportional)


def _matching(call: Call, merged: int) -> int:
    """Multiply-adds of ``pairs`` on mean keys."""
    half = call.patches // 2
    return (call.keys + half * (call.patches - half) * call.width // call.heads) if merged else 0


@reducer(
    "tofu",
    "ToFu",
    place="middle",
    needs=("keys",),
    source="Kim et al., WACV 2024 (Token Fusion)",
    licence="no official code found; PiToMe's repository (CC-BY-NC-4.0) holds one",
    differs="The blocks that prune are the first half (ours; the paper tests each model's linearity). That code "
    "divides by the norm of the destination token; here, as MLERP is defined, by that of the mean.",
    build=spread(lambda removed, setting, block: ToFu(removed, prune=2 * block < setting.blocks)),
)
class ToFu(ToMe):
    """ToMe's pairs, of which early blocks drop the token that would go, and later ones merge by MLERP.

    MLERP keeps the mean's direction and gives it the largest norm of the merged tokens: x' = m/|m| · max_i |x_i|.
    prune: drop instead of merging.
    """

    def __init__(self, removed: int, prune: bool = False, proportional: bool = True) -> None:
        super().__init__(removed, proportional)
        self.prune = prune

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer."""
        patches = context.patches(x)
        merged = self.count(patches.shape[1])
        if not merged:
            return x, context
        with torch.no_grad():
            group, going, _ = pairs(context, context.patches(context.block_keys().mean(1)), merged)
        if self.prune:
            stays = ~marked(group, going)
            return context.select(x, most(stays.to(x.dtype), patches.shape[1] - merged))
        left = patches.shape[1] - merged
        short, remaining = merge_groups(x, context, group, left, proportional=self.proportional)
        means = remaining.patches(short)
        norms = torch.linalg.vector_norm(patches, dim=-1)
        largest = norms.new_zeros(norms.shape[0], left).scatter_reduce(1, group, norms, "amax")
        length = torch.linalg.vector_norm(means, dim=-1).clamp(min=torch.finfo(norms.dtype).tiny)
        return remaining.with_patches(short, means * (largest / length)[..., None]), remaining

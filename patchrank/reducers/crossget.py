"""CrossGET: patches merge that are like another one and unlike a cross token, which is trained on texts.

Shapes: B images, N tokens, K patch tokens, M merged, D width, H heads, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.precision import wide, without_autocast
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from common.tower import Block
from patchrank.reducers.base import Call, Removing, in_order, spread
from patchrank.reducers.groups import merge_groups, numbered


class CrossToken(nn.Module):
    """The cross token of one block: the token that reads the tower out, as it enters the block, plus a learned vector.

    The vector is zero at first, as released. width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, readout: Tensor) -> Tensor:
        """readout [B,D], the class token or the end-of-text token -> [B,D]. The gradient reaches the vector alone."""
        return readout.detach() + self.offset


def cross_tokens(width: int, blocks: int) -> nn.ModuleDict:
    """The cross token of each of L blocks of width D, by the number of the block."""
    return nn.ModuleDict({str(block): CrossToken(width) for block in range(blocks)})


def cross_query(block: Block, token: Tensor) -> Tensor:
    """The query [B,D] of a token [B,D] in a block, of all heads. ValueError: the block is another library's."""
    if not isinstance(block, Block):
        raise ValueError(
            f"crossget's cross tokens are trained for blocks of this suite; {type(block).__name__} is another "
            "library's. Take the tower as an ImageTower"
        )
    width, attention = token.shape[-1], block.attn
    return F.linear(block.ln_1(token), attention.in_proj_weight[:width], attention.in_proj_bias[:width])


def complete_graph_soft_matching(similarity: Tensor, importance: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """CrossGET's matching by similarities [B,K,K], which are symmetric, and importances [B,K].

    Returns the tokens that go (long [B,M]), those that stay in their order ([B,K-M]), and the places among the latter
    into which the former go ([B,M]).
    """
    # 1. Rank the tokens by their nearest neighbour. Each compares itself with those ranked behind it, so that of two
    #    tokens that are nearest to each other only one offers to go.
    itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    nearest = similarity.masked_fill(itself, -torch.inf).amax(-1)
    rank = nearest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    behind = rank[:, None, :] > rank[:, :, None]
    likeness = similarity.masked_fill(~behind, -torch.inf).amax(-1)
    # 2. Those go that are little important beside their likeness. The one ranked last has none, and stays.
    going, staying = (importance - likeness).argsort(dim=1, stable=True).tensor_split([merged], dim=1)
    staying = in_order(staying)
    # 3. Each goes to the most similar of those that stay.
    rows = similarity.gather(1, going[..., None].expand(-1, -1, similarity.shape[2]))
    partner = rows.gather(2, staying[:, None].expand(-1, merged, -1)).argmax(-1)
    return going, staying, partner


cross_reducers = spread(lambda removed, setting, block: CrossGET(removed, setting.trained[str(block)]))
"""Setting, whose ``trained`` are ``cross_tokens`` -> the reducers of all blocks from its layer on."""


@reducer(
    "crossget",
    "CrossGET",
    place="middle",
    needs=("keys", "training"),
    source="Shi et al., ICML 2024 (CrossGET)",
    licence="released code BSD-3-Clause",
    differs="Matching and merging are the released ones, the cross token is not wholly. Released, it is one token more "
    "in the sequence: a copy of the class token that runs through all blocks, gets each block's vector on the way, and "
    "is attended to by all tokens. Here each block makes it from its own class token, and no token attends to it; so "
    "no block has a token more, and without merges the tower is as it was. As long as the vectors are zero, both "
    "are one token up to that attention. Texts are never merged (released: an option). The training differs as "
    "`patchrank/crossget_training.py` says.",
    build=cross_reducers,
    untrained=lambda width, blocks, patches: cross_tokens(width, blocks),
)
class CrossGET(Removing):
    """Merge the M patches of least I_i - max_j cos(k_i, k_j) in a block: little important, and like another patch.

    I_i = cos(k_i, q) is the importance of patch i, where k_i is its key of all heads and q the query of the block's
    cross token, the class token plus a learned vector. Training aligns cross tokens of pictures with those of their
    texts, so that what is like q matters to a text.

    Complete-graph soft matching: all patches are compared with all. They are ranked by their greatest cosine, and
    max_j runs over the patches ranked behind i. Each of the M goes to the patch that stays with the most similar key.
    Patch j, to which the patches i go, becomes [s_j x_j + Σ_i (2 w_i s_i x_i + (1 - 2 w_i) s_j x_j)] / (s_j + Σ_i s_i)
    with sizes s and w_i = exp(I_i) / (exp(I_i) + exp(I_j)). Later attention counts a token as all its patches.

    token: the block's cross token, see ``CrossToken``.
    """

    def __init__(self, removed: int, token: CrossToken) -> None:
        super().__init__(removed)
        self.token = token

    def macs(self, call: Call) -> int:
        """Keys that are not there yet, the cross token's query, and cosines of all patches with it and each other."""
        if not self.count(call.patches):
            return 0
        query = 5 * call.width + call.width**2
        return call.keys + query + (call.patches**2 + call.patches) * call.width

    @torch.no_grad()
    def compare(self, context: ReductionContext) -> tuple[Tensor, Tensor]:
        """The cosines [B,K,K] of all patches' keys, and the patches' importances [B,K], in fp32 at least."""
        query = cross_query(context.block, self.token(context.entered[:, 0]))
        keys = context.patches(context.block_keys().transpose(1, 2).flatten(2))
        keys, query = F.normalize(wide(keys), dim=-1), F.normalize(wide(query), dim=-1)
        with without_autocast(keys):
            similarity, importance = keys @ keys.mT, keys @ query[..., None]
        return torch.maximum(similarity, similarity.mT), importance.squeeze(-1)  # symmetric, however it was rounded

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer. Choice and weights have no gradient, as released."""
        patches = context.patches(x)
        merged = self.count(patches.shape[1])
        if not merged:
            return x, context
        left = patches.shape[1] - merged
        similarity, importance = self.compare(context)
        going, staying, partner = complete_graph_soft_matching(similarity, importance, merged)
        into = staying.gather(1, partner)
        share = (importance.gather(1, going) - importance.gather(1, into)).sigmoid()  # the softmax of both
        factors = torch.ones_like(importance).scatter(1, going, 2 * share).scatter_add(1, into, 1 - 2 * share)
        group = numbered((staying, torch.arange(left, device=x.device)), (going, partner))
        weighted = context.with_patches(x, patches * factors[..., None].to(x.dtype))
        return merge_groups(weighted, context, group, left, proportional=True)

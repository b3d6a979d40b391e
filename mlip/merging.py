"""MLIP's token merging: the least attended tokens are paired by similarity and merged (section 3.4, Figure 4).

Shapes: B images, N tokens (patches only), R tokens kept, C = N - R tokens merged into another, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext


def kept_tokens(rate: float, tokens: int) -> int:
    """R = floor(rate · N), with the rate as the fraction that it is written as (0.7 is 7/10, so 0.7 · 30 is 21).

    Table 13 calls the rate a compression rate. It must mean the kept share: at most half of the tokens can merge,
    and the table has 0.7. ValueError: a rate outside [0.5, 1].
    """
    if not 0.5 <= rate <= 1:
        raise ValueError(
            f"keep rate {rate} is not in [0.5, 1]: each merged token needs another to go into, so at most half go"
        )
    # A product just below a whole number is that number. A tracer gives tensors.
    return math.floor(rate * int(tokens) + 1e-9)


def pair_tokens(x: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Figure 4, steps 1 to 3: which tokens of x [B,N,D] stay, and which merge into which.

    importance: [B,N], high = keep. Equal tokens rank by their place, NaN last.
    Returns kept [B,R] (places among the N, in order of rank), gone [B,C] (places among the N) and into [B,C] (places
    among the R), the kept token that each gone token merges into.

    Of the last 2C tokens by rank, those at odd positions (the first, the third, ...) form A, the others B. Every
    token of A merges into the most similar token of B by cosine, the first of equal ones. The paper leaves open
    whether positions are ranks or places in the grid, and whether similarity compares tokens or keys; here ranks and
    tokens. Nothing here has a gradient.
    ValueError: ``keep`` is not in [N/2, N), rounded down, or is 0.
    """
    tokens = x.shape[1]
    if not max(tokens // 2, 1) <= keep < tokens:
        raise ValueError(f"{keep} of {tokens} tokens to keep: merging in pairs leaves {tokens // 2} to {tokens - 1}")
    with torch.no_grad():
        order = importance.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
        unmerged = max(tokens - 2 * (tokens - keep), 0)
        gone, partners = order[:, unmerged::2], order[:, unmerged + 1 :: 2]  # sets A and B
        a, b = (F.normalize(take(wide(x), places), dim=-1) for places in (gone, partners))
        into = unmerged + products(a, b).argmax(-1)  # bf16 would send a quarter of the tokens elsewhere
    return torch.cat([order[:, :unmerged], partners], dim=1), gone, into


def combine(x: Tensor, sizes: Tensor, kept: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Figure 4, step 4, after ``pair_tokens``: means weighted by size [B,R,D], and the new sizes [B,R].

    Several tokens may merge into one.
    """
    total = sizes.gather(1, kept).scatter_add(1, into, sizes.gather(1, gone))
    weighted = x * sizes[..., None]
    places = into[..., None].expand(-1, -1, x.shape[-1])
    merged = take(weighted, kept).scatter_add(1, places, take(weighted, gone)) / total[..., None]
    return merged.to(x.dtype), total


def merge(x: Tensor, sizes: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Merge N tokens into ``keep``: x [B,N,D] -> [B,R,D], their sizes [B,N] (patches that each stands for) -> [B,R].

    importance: [B,N], high = keep. Merging preserves the sum of the sizes and the sum of size times token.
    ``keep`` = N changes nothing. ValueError: see ``pair_tokens``.
    """
    if keep == x.shape[1]:
        return x, sizes
    return combine(x, sizes, *pair_tokens(x, importance, keep))


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x [B,N,D] at ``places`` (long [B,R]) -> [B,R,D]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def equal_cost(setting: Setting) -> dict[Place, Reducer]:
    """Merging in the fewest blocks from ``layer`` on that loses as many tokens as pruning before ``layer`` would.

    Summed over the blocks, pruning loses L' (K - R) tokens in L' blocks. Two blocks merge r tokens each, as in the
    paper; where r would be more than half of what is there, more blocks do. Where even halving in every block is too
    little, that is what happens, and it costs more than pruning.
    """
    blocks, patches = setting.blocks - setting.layer, setting.patches
    gone = blocks * (patches - max(1, round(setting.keep * patches)))
    count = min(2, blocks)
    while count < blocks and _each(gone, blocks, count) * (count + 1) > patches:
        count += 1
    removed = round(_each(gone, blocks, count))
    return {(setting.layer + i, "middle"): Merging(removed=removed) for i in range(count)} if removed else {}


def _each(gone: int, blocks: int, count: int) -> float:
    """r, by which ``count`` merges from the first of ``blocks`` on lose ``gone`` tokens in sum."""
    return gone / sum(blocks - i for i in range(count))


@reducer(
    "mlip-merging",
    "MLIP's merging",
    place="middle",
    needs=("class token",),
    source="MLIP, ICML 2024, section 3.4 and Figure 4",
    licence="no code was released",
    differs="Outside MLIP's tower there are no frequency features and no Guide, which the paper merges by. Two blocks "
    "merge one number of tokens each, so that as many are gone over all blocks as when pruning.",
    build=equal_cost,
)
@dataclass(frozen=True)
class Merging:
    """Pair the patches to which the class token attends least by likeness, and merge: ``merge`` as a reducer.

    Of the last 2C by attention, those at odd ranks join the most similar of those at even ranks, by the cosine of the
    tokens; each is the mean of its patches, by size. It stands between a block's half steps.

    A token's importance is the class token's attention to it in this block, averaged over heads. The paper names
    the class token and leaves block and heads open. The class token itself never merges.

    rate: share of the patch tokens that stay, see ``kept_tokens``; None: ``removed`` says how many go.
    proportional: later blocks add the logarithm of a token's size to its attention logits (as ToMe does), so that a
        merged token counts for all its patches. This option is not in the paper.
    removed: C, at most half of the tokens; None: ``rate`` says how many stay.
    ValueError: both of them, or neither.
    """

    rate: float | None = None
    proportional: bool = False
    removed: int | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.removed is None):
            raise ValueError(f"rate {self.rate} and removed {self.removed}: give one of them")

    def left(self, patches: int) -> int:
        """How many patch tokens it leaves of ``patches``."""
        if self.removed is None:
            return kept_tokens(self.rate, patches)
        return patches - min(self.removed, patches // 2)

    def macs(self, call) -> int:  # of patchrank.reducers.base.Call, which this package must not import
        """The class token's row, and the cosines of the tokens that go with as many others."""
        gone = call.patches - self.left(call.patches)
        return (call.class_row + gone**2 * call.width) if gone else 0

    def __call__(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,1+N,D] -> [B,1+R,D]; positions of tokens that stand for several become -1."""
        patches = context.patches(x)
        keep = self.left(int(patches.shape[1]))  # a traced size is a tensor
        if keep == patches.shape[1]:
            return x, context
        sizes = patches.new_ones(patches.shape[:2], dtype=torch.float32) if context.sizes is None else context.sizes
        with torch.no_grad():
            importance = context.class_attention()
        kept, gone, into = pair_tokens(patches, importance, keep)
        centres = context.centres
        if centres is not None:
            centres, _ = combine(centres, sizes, kept, gone, into)
        merged, sizes = combine(patches, sizes, kept, gone, into)
        x, context = context.select(x, kept)
        bias = context.bias
        if self.proportional or bias is not None:
            bias = F.pad(sizes.log(), (context.leading, context.trailing)).to(x.dtype)[:, None, None]
        positions = context.positions.scatter(1, into, -1)
        context = replace(context, positions=positions, sizes=sizes, centres=centres, bias=bias)
        return context.with_patches(x, merged), context

"""MLIP's token merging: the least attended tokens are paired by likeness and become one (section 3.4, Figure 4).

Shapes: B images, N tokens (patches only), R tokens kept, C = N - R tokens that end in another, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from common.reduction import ReductionContext


def kept_tokens(rate: float, tokens: int) -> int:
    """R = floor(rate · N), for the fraction that the float stands for (0.7 is 7/10).

    Table 13 calls the rate a compression rate; only as the kept share can it be above one half (see ``merge``).
    ValueError: a rate outside [0.5, 1].
    """
    if not 0.5 <= rate <= 1:
        raise ValueError(
            f"keep rate {rate} is not in [0.5, 1]: each merged token needs another to go into, so at most half go"
        )
    return math.floor(Fraction(rate).limit_denominator(1_000_000) * int(tokens))  # a tracer gives tensors


def match(x: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stay and which go into which: kept [B,R], gone [B,C] (places among the N), into [B,C] (among the R).

    Tokens are ranked by ``importance`` [B,N] (high = keep; equal ones by their place, NaN last). Of the last 2C those
    at odd ranks (the first, the third, ...) form A and the others B, and every token of A goes into the token of B
    with the most similar x [B,N,D] by cosine, the first of equal ones. The paper does not say whether the positions
    are ranks or places in the grid, and whether similarity is that of tokens or keys: ranks and tokens here.
    ``kept`` stands in order of rank. Nothing here has a gradient.
    ValueError: ``keep`` is not in [N/2, N), rounded down, or is 0.
    """
    tokens = x.shape[1]
    if not max(tokens // 2, 1) <= keep < tokens:
        raise ValueError(f"{keep} of {tokens} tokens to keep: merging in pairs leaves {tokens // 2} to {tokens - 1}")
    with torch.no_grad():
        order = importance.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
        standing = max(tokens - 2 * (tokens - keep), 0)
        gone, partners = order[:, standing::2], order[:, standing + 1 :: 2]
        a, b = (F.normalize(take(x, places), dim=-1) for places in (gone, partners))
        into = standing + (a @ b.transpose(1, 2)).argmax(-1)
    return torch.cat([order[:, :standing], partners], dim=1), gone, into


def combine(x: Tensor, sizes: Tensor, kept: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [B,R,D] after ``match``, means weighted by size, and their sizes [B,R]; several may go into one."""
    total = sizes.gather(1, kept).scatter_add(1, into, sizes.gather(1, gone))
    weighted = x * sizes[..., None]
    places = into[..., None].expand(-1, -1, x.shape[-1])
    merged = take(weighted, kept).scatter_add(1, places, take(weighted, gone)) / total[..., None]
    return merged.to(x.dtype), total


def merge(x: Tensor, sizes: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Merge N tokens into ``keep``: x [B,N,D] -> [B,R,D], their sizes [B,N] (patches that each stands for) -> [B,R].

    importance: [B,N], high = keep. The sum of the sizes stays, and so does that of size times token.
    ``keep`` = N changes nothing. ValueError: see ``match``.
    """
    if keep == x.shape[1]:
        return x, sizes
    return combine(x, sizes, *match(x, importance, keep))


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x [B,N,D] at ``places`` (long [B,R]) -> [B,R,D]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Merging:
    """``merge`` as a reducer, for the place between a block's half steps.

    A token's importance is the attention that the class token paid it in this block, the mean over heads; neither
    block nor mean is stated in the paper. The class token itself never merges.

    rate: share of the patch tokens that stay, see ``kept_tokens``.
    proportional: later blocks add the logarithm of a token's size to its attention logits (as ToMe does), so that a
        merged token counts for all its patches. An option: the paper does not mention it.
    """

    rate: float
    proportional: bool = False

    def __call__(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,1+N,D] -> [B,1+R,D]; positions of tokens that stand for several become -1."""
        patches = context.patches(x)
        keep = kept_tokens(self.rate, int(patches.shape[1]))  # a traced size is a tensor
        if keep == patches.shape[1]:
            return x, context
        sizes = patches.new_ones(patches.shape[:2], dtype=torch.float32) if context.sizes is None else context.sizes
        with torch.no_grad():
            importance = context.class_attention()
        kept, gone, into = match(patches, importance, keep)
        merged, sizes = combine(patches, sizes, kept, gone, into)
        x, context = context.select(x, kept)
        bias = context.bias
        if self.proportional:
            bias = F.pad(sizes.log(), (context.leading, context.trailing)).to(x.dtype)[:, None, None]
        positions = context.positions.scatter(1, into, -1)
        return context.with_patches(x, merged), replace(context, positions=positions, sizes=sizes, bias=bias)

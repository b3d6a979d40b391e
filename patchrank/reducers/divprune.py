"""DivPrune: the tokens that are most unlike each other stay.

Shapes: B images, N tokens, K patch tokens, R kept, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order
from patchrank.reducers.farthest import cosines, farthest


def most_diverse(tokens: Tensor, count: int) -> Tensor:
    """Max-min diversity by cosine distance: choose ``count`` of the tokens [B,K,F] -> long [B,R], in order of choice.

    The first is the token whose nearest other is farthest; each further one is the farthest from all chosen.
    """
    distances = 1 - cosines(tokens)
    if count == tokens.shape[1]:
        return torch.arange(count, device=tokens.device).expand(tokens.shape[0], -1)
    first = distances.topk(2, dim=1, largest=False).values[:, 1].argmax(-1)
    return farthest(distances, first, count)


@reducer(
    "divprune",
    "DivPrune",
    source="Alvar et al., CVPR 2025 (DivPrune)",
    licence="released code CC-BY-NC-4.0; nothing of it is here",
    differs="It prunes the tokens that enter a language model; here those of a block, by choice its keys. Among equal "
    "tokens the released loop can choose one twice; here never.",
)
class DivPrune(Keeping):
    """Keep the R = round(keep·K) patches of greatest max-min diversity, where d_ij = 1 - cos(x_i, x_j).

    First argmax_i min_{j≠i} d_ij, then again and again argmax_i min_{j chosen} d_ij. Half a token rounds to the even
    number, as released. Kept tokens stay in the order of their places. It reads no attention, so it works before the
    first block.

    of: "tokens", or "keys", the block's, averaged over heads.
    """

    def __init__(self, keep: float, of: Literal["tokens", "keys"] = "tokens") -> None:
        super().__init__(keep)
        if of not in ("tokens", "keys"):
            raise ValueError(f"of {of!r} is none of tokens, keys")
        self.of = of

    def left(self, patches: int) -> int:
        return max(1, round(self.keep * int(patches)))

    def macs(self, call: Call) -> int:
        """The cosines between all pairs, and keys that are not there yet."""
        if self.of == "tokens":
            return call.patches**2 * call.width
        return call.keys + call.patches**2 * call.width // call.heads

    @torch.no_grad()
    def chosen(self, x: Tensor, context: ReductionContext) -> Tensor:
        """The places (long [B,R]) that stay, in ascending order."""
        tokens = context.patches(x if self.of == "tokens" else context.block_keys().mean(1))
        return in_order(most_diverse(tokens, self.left(tokens.shape[1])))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        return context.select(x, self.chosen(x, context))

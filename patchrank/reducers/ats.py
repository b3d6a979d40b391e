"""ATS: tokens are sampled by their significance, from few where it is spread out to many where it is not.

Shapes: B images, N tokens, K patch tokens, R points, D width, H heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from common.precision import wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, most
from patchrank.reducers.groups import sizes_of


def sampled(significance: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling of tokens by their significance [B,K] -> places (long [B,R]), repeats (bool [B,R]).

    Tokens are sorted by significance and its cumulative sum runs from 0 to 1; of R points, evenly spaced from the
    smallest value above zero to 1, each takes the token whose sum is nearest. A token that the point before took
    already is a repeat.
    """
    ascending, order = significance.sort(dim=1, stable=True)
    total = ascending.cumsum(1)
    total = (total - total[:, :1]) / (total[:, -1:] - total[:, :1]).clamp(min=torch.finfo(total.dtype).tiny)
    start = total.masked_fill(total <= 0, 1).amin(1, keepdim=True)
    # One point takes the most significant token, the end of the scale.
    step = torch.linspace(0 if points > 1 else 1, 1, points, dtype=total.dtype, device=total.device)
    levels = start + (1 - start) * step  # [B,R]
    nearest = (levels[..., None] - total[:, None]).abs().argmin(-1)
    first = torch.ones_like(nearest[:, :1], dtype=torch.bool)
    fresh = torch.cat([first, nearest[:, 1:] != nearest[:, :-1]], dim=1)
    return order.gather(1, nearest), ~fresh


@reducer(
    "ats",
    "ATS",
    place="middle",
    needs=("class token",),
    source="Fayyaz et al., ECCV 2022 (ATS)",
    licence="released code Apache-2.0",
    differs="The number of sampled tokens differs from picture to picture, and is at least 8. Here shapes are fixed: a "
    "repeat stays as a token of size 0 that nothing attends to, so multiply-adds are those of all R points, and no "
    "least number is kept.",
    exceptions={"identity": "R points of K tokens take some twice, and others never"},
)
class ATS(Keeping):
    """Sample R = keep·K tokens by significance S_j = a_j |v_j| / Σ a_i |v_i|, repeats merged.

    a is the class token's attention, mean over heads, v_j the value of token j, all heads as one vector.

    form: "sampled", as released; "top" takes the R most significant instead.
    """

    masks = True

    def __init__(self, keep: float, form: Literal["sampled", "top"] = "sampled") -> None:
        super().__init__(keep)
        if form not in ("sampled", "top"):
            raise ValueError(f"form {form!r} is none of sampled, top")
        self.form = form

    def macs(self, call: Call) -> int:
        """The class token's row, and the values of all tokens, computed again."""
        return call.class_row + call.values

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, of which repeats have size 0 and position -1."""
        with torch.no_grad():
            values = wide(context.patches(context.block_values().transpose(1, 2).flatten(2)))
            weighted = context.class_attention() * torch.linalg.vector_norm(values, dim=-1)
            significance = weighted / weighted.sum(1, keepdim=True)
            count = self.left(significance.shape[1])
            if self.form == "top":
                return context.select(x, most(significance, count))
            places, repeat = sampled(significance, count)
        short, remaining = context.select(x, places)
        sizes = sizes_of(remaining).masked_fill(repeat, 0)
        hidden = torch.zeros_like(repeat, dtype=x.dtype).masked_fill(repeat, -torch.inf)
        bias = remaining.with_patches(x.new_zeros(*short.shape[:2], 1), hidden[..., None])[:, None, None, :, 0]
        if remaining.bias is not None:
            bias = bias + remaining.bias
        positions = remaining.positions.masked_fill(repeat, -1)
        return short, replace(remaining, positions=positions, sizes=sizes, bias=bias)

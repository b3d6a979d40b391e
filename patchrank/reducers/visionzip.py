"""VisionZip: attended patches stay, the rest become a few contextual tokens.

Shapes: B images, N tokens, K patch tokens, R left, C contextual, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, most
from patchrank.reducers.groups import grouped_sum, merge_groups, numbered

_RELEASED = "It works there on the last block but one, after the tower ran, where a token's scale is free."


@reducer(
    "visionzip-released",
    "VisionZip, released",
    place="middle",
    needs=("class token", "keys"),
    source="Yang et al., CVPR 2025 (VisionZip)",
    licence="released code Apache-2.0",
    differs=f"{_RELEASED} This is the released form; `visionzip` is the other one.",
    options={"form": "released"},
)
@reducer(
    "visionzip",
    "VisionZip, averaged",
    place="middle",
    needs=("class token", "keys"),
    source="Yang et al., CVPR 2025 (VisionZip)",
    licence="released code Apache-2.0",
    differs=f"{_RELEASED} Here a contextual token is its group's mean, which has the scale of a token. Otherwise it is "
    "`visionzip-released`, which does what the released code does.",
)
class VisionZip(Keeping):
    """Keep the R - C patches to which the class token attends most; the others form C contextual tokens.

    Every (n // C)-th of the n others, in their order, is a target; each of the rest joins the target of the most
    similar key (cosine, keys averaged over heads). Dominant tokens keep their order.

    contextual: C's share of R, rounded; at least one. The default gives the released 10 of 64, 20 of 128, 30 of 192.
    form: "averaged", the mean of target and members by size; "released", target + mean of the members, which has
        about twice a token's scale.
    """

    def __init__(
        self, keep: float, contextual: float = 10 / 64, form: Literal["averaged", "released"] = "averaged"
    ) -> None:
        super().__init__(keep)
        if not 0 < contextual < 1:
            raise ValueError(f"contextual {contextual} is not in (0, 1); it is a share of the tokens that are left")
        if form not in ("averaged", "released"):
            raise ValueError(f"form {form!r} is none of averaged, released")
        self.contextual, self.form = contextual, form

    def split(self, patches: int) -> tuple[int, int]:
        """R - C and C of ``patches``."""
        left = int(self.left(patches))  # a traced size is a tensor
        if left == patches:
            return left, 0
        contextual = min(left, max(1, round(self.contextual * left)))
        return left - contextual, contextual

    def macs(self, call: Call) -> int:
        """The class token's row, keys that are not there yet, and the cosines of the others with their targets."""
        dominant, contextual = self.split(call.patches)
        others = call.patches - dominant
        if not contextual:
            return 0
        products = (others - contextual) * contextual * call.width // call.heads
        return call.class_row + call.keys + products

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens: the dominant ones, then the contextual ones."""
        dominant, contextual = self.split(x.shape[1] - context.leading - context.trailing)
        if not contextual:
            return x, context
        with torch.no_grad():
            attention = context.class_attention()
            rank = most(attention, attention.shape[1])
            kept, others = in_order(rank[:, :dominant]), in_order(rank[:, dominant:])
            step = others.shape[1] // contextual
            first = others[:, : contextual * step].unflatten(1, (contextual, step))
            targets = first[:, :, 0]
            rest = torch.cat([first[:, :, 1:].flatten(1), others[:, contextual * step :]], dim=1)
            keys = F.normalize(wide(context.patches(context.block_keys().mean(1))), dim=-1)
            of = [keys.gather(1, places[..., None].expand(-1, -1, keys.shape[-1])) for places in (rest, targets)]
            into = products(*of).argmax(-1)
            numbers = torch.arange(dominant + contextual, device=x.device)
            group = numbered((kept, numbers[:dominant]), (targets, numbers[dominant:]), (rest, dominant + into))
        patches, left = context.patches(x), dominant + contextual
        short, remaining = merge_groups(x, context, group, left)
        if self.form == "released":
            places = [where[..., None].expand(-1, -1, patches.shape[-1]) for where in (kept, targets, rest)]
            members = into[..., None].expand_as(places[2])
            sums = torch.zeros_like(patches[:, :contextual]).scatter_add(1, members, patches.gather(1, places[2]))
            counts = grouped_sum(torch.ones_like(into)[..., None], into, contextual).clamp(min=1)
            merged = patches.gather(1, places[1]) + sums / counts
            short = remaining.with_patches(short, torch.cat([patches.gather(1, places[0]), merged], dim=1))
        return short, remaining

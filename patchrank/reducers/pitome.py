"""PiToMe: tokens that have many near-duplicates merge, the others are protected.

Shapes: B images, N tokens, K patch tokens, M merged, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.reducer_registry import Setting, reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Removing, most, spread
from patchrank.reducers.farthest import cosines
from patchrank.reducers.groups import merge_groups, numbered


def clip_margin(block: int, blocks: int) -> float:
    """The released margin of a CLIP's block: 0.95 (1 - block / blocks)."""
    return 0.95 * (1 - block / blocks)


def _make(removed: int, setting: Setting, block: int) -> PiToMe:
    return PiToMe(removed, clip_margin(block, setting.blocks))


@reducer(
    "pitome",
    "PiToMe",
    place="middle",
    source="Tran et al., NeurIPS 2024 (PiToMe)",
    licence="released code CC-BY-NC-4.0; nothing of it is here",
    differs="Every block merges one number of tokens; released, one share, so that tokens fall geometrically.",
    build=spread(_make),
)
class PiToMe(Removing):
    """Merge M tokens of high energy into M others: E_i = mean_j ELU(cos(x_i, x_j) - margin).

    The 2M tokens of the highest energy alternate between A and B, by rank; each of A joins the most similar of B.
    Merged tokens are means by size. The other tokens are protected and come first.

    margin: released for CLIP as 0.95 (1 - l/L) in block l of L.
    of: "tokens", as released for CLIP, or "keys", averaged over heads, as for other ViTs.
    proportional: off, as released for CLIP.
    """

    def __init__(
        self, removed: int, margin: float = 0.5, of: Literal["tokens", "keys"] = "tokens", proportional: bool = False
    ) -> None:
        super().__init__(removed)
        if of not in ("tokens", "keys"):
            raise ValueError(f"of {of!r} is none of tokens, keys")
        self.margin, self.of, self.proportional = margin, of, proportional

    def macs(self, call: Call) -> int:
        """The cosines between all pairs, and keys that are not there yet."""
        if not self.count(call.patches):
            return 0
        if self.of == "tokens":
            return call.patches**2 * call.width
        return call.keys + call.patches**2 * call.width // call.heads

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with M patch tokens fewer."""
        patches = x.shape[1] - context.leading - context.trailing
        merged = self.count(patches)
        if not merged:
            return x, context
        left = patches - merged
        with torch.no_grad():
            similarity = cosines(context.patches(x if self.of == "tokens" else context.block_keys().mean(1)))
            energy = F.elu(similarity - self.margin).mean(-1)
            mergeable, protected = most(energy, patches).tensor_split([2 * merged], dim=1)
            a, b = mergeable[:, ::2], mergeable[:, 1::2]
            rows = similarity.gather(1, a[..., None].expand(-1, -1, patches))
            partner = rows.gather(2, b[:, None].expand(-1, merged, -1)).argmax(-1)
            numbers, first = torch.arange(left, device=x.device), left - merged
            group = numbered((protected, numbers[:first]), (b, numbers[first:]), (a, first + partner))
        return merge_groups(x, context, group, left, proportional=self.proportional)

"""ZOO-Prune: sensitive and diverse tokens stay, the sensitivity measured by small random steps.

Shapes: B images, N tokens, K patch tokens, R kept, D width, E joint dim, m directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, readout_of
from patchrank.reducers.farthest import cosines, farthest

DIRECTIONS = {"ours": 4, "released": 64}
"""m of each form."""
_TOGETHER = 8  # directions: few enough for memory, and many enough that a graph of 64 stays short
_WIDTH = 4096  # of the table of directions: no tower is wider


_SOURCE = "ZOO-Prune (2025), from its abstract, its public pages and its code"
_LICENCE = "released code has no licence of its own (LLaVA's files: Apache-2.0); nothing of it is here"


@reducer(
    "zoo-prune-released",
    "ZOO-Prune, released",
    needs=("readout",),
    source=_SOURCE,
    licence=_LICENCE,
    differs="f is the projector of a language model there, before which it prunes. This is the released form; "
    "`zoo-prune` is the other one. It costs more than pruning saves: 128 readouts of every token.",
    build=lambda setting: {
        setting.layer: ZOOPrune(setting.keep, readout_of(setting, "zoo-prune-released"), form="released")
    },
    options={"form": "released"},
)
@reducer(
    "zoo-prune",
    "ZOO-Prune, ours",
    needs=("readout",),
    source=_SOURCE,
    licence=_LICENCE,
    differs="Fewer directions (64 would cost 10.0 GMACs, more than half of ViT-B/16), a step by the token's length, "
    "sensitivity divided by the largest, distances between the tokens themselves, and keep·K rounded. Otherwise it is "
    "`zoo-prune-released`, which does what the released code does.",
    build=lambda setting: {setting.layer: ZOOPrune(setting.keep, readout_of(setting, "zoo-prune"))},
)
class ZOOPrune(Keeping):
    """Keep R patches greedily by sensitivity times distance: w_i · min over the chosen of 1 - cos(y_i, y_j).

    S_i = mean over m random unit directions u of |f(x_i + hu) - f(x_i - hu)| / 2h, where f is the tower's last norm
    and projection. The most sensitive token is the first. Through a linear f all tokens would be equally sensitive:
    the norm tells them apart. Directions are the same for all tokens and pictures.

    readout: f, tokens [B,K,D] -> [B,K,E].
    form: "ours": m = 4, h = 0.01 |x_i|, w = S / max S, y = x, R = keep·K rounded. "released": m = 64, h = 0.01,
        w = (S - min S) / (max S - min S), so that the least sensitive token has weight 0, y = f(x), R = int(keep·K).
    directions: m; None: that of the form.
    seed: of the directions.
    """

    def __init__(
        self,
        keep: float,
        readout: Callable[[Tensor], Tensor],
        form: Literal["ours", "released"] = "ours",
        directions: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(keep)
        if form not in DIRECTIONS:
            raise ValueError(f"form {form!r} is none of {', '.join(DIRECTIONS)}")
        if directions is not None and directions < 1:
            raise ValueError(f"directions {directions} is below 1; leave it out for those of the form")
        self.readout, self.form = readout, form
        count = DIRECTIONS[form] if directions is None else directions
        table = torch.randn(count, _WIDTH, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("directions", table, persistent=False)

    def left(self, patches: int) -> int:
        return max(1, int(self.keep * int(patches))) if self.form == "released" else super().left(patches)

    def macs(self, call: Call) -> int:
        """The last norm and projection of 2m copies of every token, and the cosines between all pairs.

        Released, one more readout, and cosines of E numbers instead of D.
        """
        readout = call.patches * call.width * (5 + call.embed_dim)
        if self.form == "released":
            return (2 * len(self.directions) + 1) * readout + call.patches**2 * call.embed_dim
        return 2 * len(self.directions) * readout + call.patches**2 * call.width

    def sensitivity(self, patches: Tensor) -> Tensor:
        """S [B,K] of patch tokens [B,K,D]."""
        unit = F.normalize(self.directions[:, : patches.shape[-1]].to(patches.dtype), dim=-1)
        length = torch.linalg.vector_norm(patches, dim=-1, keepdim=True)
        step = 0.01 * (torch.ones_like(length) if self.form == "released" else length)
        total = 0.0
        for part in unit.split(_TOGETHER):
            moves, copies = step[:, None] * part[:, None], patches[:, None]  # [B,m',K,D], [B,1,K,D]
            ends = [self.readout(moved.flatten(1, 2)) for moved in (copies + moves, copies - moves)]
            change = torch.linalg.vector_norm(ends[0] - ends[1], dim=-1)
            total = total + change.unflatten(1, (len(part), -1)).sum(1)
        return total / (2 * len(unit) * step.squeeze(-1))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, in the order of their places."""
        with torch.no_grad():
            patches = context.patches(x)
            score = self.sensitivity(patches)
            if self.form == "released":
                score = score - score.amin(1, keepdim=True)
            weight = score / score.amax(1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
            compared = self.readout(patches) if self.form == "released" else patches
            kept = farthest(1 - cosines(compared), score.argmax(1), self.left(patches.shape[1]), weight)
        return context.select(x, in_order(kept))

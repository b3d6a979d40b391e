"""ZOO-Prune: sensitive and diverse tokens stay, the sensitivity measured by small random steps.

Shapes: B images, N tokens, K patch tokens, R kept, D width, E joint dim, m directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, readout_of
from patchrank.reducers.farthest import cosines, farthest

_WIDTH = 4096  # of the table of directions: no tower is wider


@reducer(
    "zoo-prune",
    "ZOO-Prune",
    needs=("readout",),
    source="ZOO-Prune (2025), from its abstract, its public pages and its code",
    licence="released code has no licence of its own (LLaVA's files: Apache-2.0); nothing of it is here",
    differs="Not equal to the released code: ours takes 4 directions (64 would cost 10.0 GMACs, more than half of "
    "ViT-B/16), a step of a hundredth of the token's length, sensitivity divided by the largest, the tower's "
    "readout as f, distances between the tokens themselves, and keep·K rounded. The choice itself is the same.",
    build=lambda setting: {setting.layer: ZOOPrune(setting.keep, readout_of(setting, "zoo-prune"))},
)
class ZOOPrune(Keeping):
    """Keep R patches greedily by sensitivity times distance: S_i · min over the chosen of 1 - cos(x_i, x_j).

    S_i = mean over m random unit directions u of |f(x_i + hu) - f(x_i - hu)| / 2h, where f is the tower's last norm
    and projection and h = 0.01 |x_i|; divided by the picture's largest. The most sensitive token is the first. Through
    a linear f all tokens would be equally sensitive: the norm tells them apart.

    The released code takes 64 directions, the same for all tokens, and h = 0.01 whatever the token's length; f is the
    projector of a language model, before which it prunes. It scales the sensitivities of a picture to [0, 1], so that
    the least sensitive token has weight 0, measures distances between projected tokens, and keeps int(keep·K).

    readout: f, tokens [B,K,D] -> [B,K,E].  directions: m.  seed: of the directions.
    """

    def __init__(self, keep: float, readout: Callable[[Tensor], Tensor], directions: int = 4, seed: int = 0) -> None:
        super().__init__(keep)
        if directions < 1:
            raise ValueError(f"directions {directions} is below 1; the default is 4, the released number 64")
        self.readout = readout
        table = torch.randn(directions, _WIDTH, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("directions", table, persistent=False)

    def macs(self, call: Call) -> int:
        """The cosines between all pairs, and the last norm and projection of 2m copies of every token."""
        readout = 2 * len(self.directions) * (5 + call.embed_dim)
        return (call.patches + readout) * call.patches * call.width

    def sensitivity(self, patches: Tensor) -> Tensor:
        """S [B,K] of patch tokens [B,K,D], not yet divided by the largest."""
        unit = F.normalize(self.directions[:, : patches.shape[-1]].to(patches.dtype), dim=-1)
        step = 0.01 * torch.linalg.vector_norm(patches, dim=-1, keepdim=True)
        total = 0.0
        for direction in unit:
            change = self.readout(patches + step * direction) - self.readout(patches - step * direction)
            total = total + torch.linalg.vector_norm(change, dim=-1)
        return total / (2 * len(unit) * step.squeeze(-1))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, in the order of their places."""
        with torch.no_grad():
            patches = context.patches(x)
            score = self.sensitivity(patches)
            score = score / score.amax(1, keepdim=True)
            kept = farthest(1 - cosines(patches), score.argmax(1), self.left(patches.shape[1]), score)
        return context.select(x, in_order(kept))

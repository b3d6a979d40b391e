"""Random pruning: the same places in every picture, or new ones for each batch or each picture.

Shapes: B images, N tokens, K patch tokens, R kept, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.ranks import of_this_rank
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Keeping, most

_PLACES = 2**14  # in the table of RandomKeep: a grid of 128 x 128


@reducer(
    "random",
    "random, one draw for all pictures",
    source="a control",
    licence="none is needed",
)
class RandomKeep(Keeping):
    """Keep random patches, the same places of the grid in every image.

    They are drawn once, when the reducer is made. Only ``seed`` chooses them, so a result depends neither on the batch
    nor on the order of the images. It is that of one draw: several seeds give the spread, and `random-per-batch` and
    `random-per-picture` average over draws. An exported graph holds the places. A token that stands for several patches
    has no place in the grid; its draw is that of its place in the sequence.
    """

    def __init__(self, keep: float, seed: int = 0) -> None:
        super().__init__(keep)
        # The first half of the table is for places of the grid, the second for merged tokens.
        rank = torch.rand(2 * _PLACES, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rank", rank, persistent=False)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        positions = context.positions
        merged = _PLACES + torch.arange(positions.shape[1], device=positions.device)
        rank = self.rank[positions.where(positions >= 0, merged)]
        return context.select(x, most(rank, self.left(rank.shape[1])))


@reducer(
    "random-per-batch",
    "random, a draw for each batch",
    source="a control",
    licence="none is needed",
    exceptions={"batch": "every batch has a new draw from torch's generator"},
)
class RandomPerBatch(Keeping):
    """Keep random patches, the same in all pictures of a call, drawn anew in each call from torch's default generator.

    So an accuracy over many batches is a mean over as many draws. ``torch.manual_seed`` decides them. A sweep seeds
    every batch by its number, so the same batches have the same places again. Ranks of one seed draw the same ones. An
    exported graph draws in each call too.
    """

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        batch, patches = context.positions.shape
        rank = torch.rand(1, patches, device=x.device).expand(batch, -1)
        return context.select(x, most(rank, self.left(patches)))


@reducer(
    "random-per-picture",
    "random, a draw for each picture",
    source="Li et al., CVPR 2023 (FLIP), whose training drops patches so",
    licence="nothing of its code is here",
    differs="FLIP trains with it; here it also runs in evaluation, where ``torch.manual_seed`` decides.",
    exceptions={"batch": "every picture has new draws from torch's generator, in the order of the batch"},
)
class RandomPerPicture(Keeping):
    """Keep random patches, drawn anew for each picture of every rank in each call from torch's default generator.

    So an accuracy is a mean over as many draws as pictures. As with `random-per-batch`, ``torch.manual_seed`` decides
    them, and an exported graph draws in each call.
    """

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        batch, patches = context.positions.shape
        rank = of_this_rank(lambda rows: torch.rand(rows, patches, device=x.device), batch)
        return context.select(x, most(rank, self.left(rank.shape[1])))

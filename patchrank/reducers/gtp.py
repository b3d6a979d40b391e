"""GTP-ViT: pruned tokens leave a part of themselves to their neighbours in the grid.

Shapes: B images, N tokens, K patch tokens, R kept, D width, H heads, g patches a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Call, Keeping, most


def neighbour_graph(grid: int) -> Tensor:
    """The normalised graph [g²,g²] of the eight neighbours of each patch: D^-1/2 A D^-1/2, with the degrees D."""
    place = torch.arange(grid**2)
    row, column = place // grid, place % grid
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    graph = near.double() - torch.eye(grid**2, dtype=torch.double)
    degree = graph.sum(1).clamp(min=1) ** -0.5
    return degree[:, None] * graph * degree


def _build(setting: Setting) -> dict[Place, Reducer]:
    return {(setting.layer, "middle"): GTP(setting.keep, setting.grid)}


@reducer(
    "gtp",
    "GTP-ViT",
    place="middle",
    needs=("attention", "places"),
    source="Xu et al., WACV 2024 (GTP-ViT)",
    licence="released code Apache-2.0",
    differs="The graph is the spatial one of its released variants, α = 0.1 its default. It removes a few tokens in "
    "every block there, each time from the same graph, as several places do here. Tokens that stand for several "
    "patches have no place and pass nothing on.",
    build=_build,
    exceptions={"levels": "the tokens of a level are no square grid"},
)
class GTP(Keeping):
    """Keep the R patches of highest score and add α·W·(the others) to them, W the graph of neighbours in the grid.

    A patch's score is the largest attention of any head that it pays itself times the largest sum, over all queries,
    that it receives in any head. W is the normalised graph of eight neighbours, cut to kept rows and pruned columns.

    grid: g.  alpha: α.
    """

    def __init__(self, keep: float, grid: int, alpha: float = 0.1) -> None:
        super().__init__(keep)
        self.alpha = alpha
        self.register_buffer("graph", neighbour_graph(grid).float(), persistent=False)

    def macs(self, call: Call) -> int:
        """The attention matrix, and what goes from the pruned to the kept."""
        kept = self.left(call.patches)
        return call.attention + kept * (call.patches - kept) * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, highest score first."""
        patches = context.patches(x)
        with torch.no_grad():
            attention = context.attention()
            itself = attention.diagonal(dim1=-2, dim2=-1).amax(1)
            received = attention.sum(-2).amax(1)
            rank = most(context.patches(itself * received), patches.shape[1])
            kept, gone = rank.tensor_split([self.left(patches.shape[1])], dim=1)
            placed = context.positions >= 0
            of = context.positions.clamp(min=0)
            weights = self.graph[of.gather(1, kept)[:, :, None], of.gather(1, gone)[:, None]]
            weights = weights * (placed.gather(1, kept)[:, :, None] & placed.gather(1, gone)[:, None])
        passed = patches.gather(1, gone[..., None].expand(-1, -1, patches.shape[-1]))
        short, remaining = context.select(x, kept)
        spread = remaining.patches(short) + self.alpha * (weights.to(x.dtype) @ passed)
        return remaining.with_patches(short, spread), remaining

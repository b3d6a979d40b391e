"""Controls that look at nothing: the centre of the picture, and half the resolution.

Shapes: B images, N tokens, K patch tokens, R kept, D width, g patches a side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.reducer_registry import Setting, reducer
from common.reduction import Place, Reducer, ReductionContext
from patchrank.reducers.base import Keeping, TokenReducer
from patchrank.reducers.groups import merge_groups

_LEVELS = {"levels": "the tokens of a level are no square grid"}


def _crop(setting: Setting) -> dict[Place, Reducer]:
    return {setting.layer: CentreCrop(setting.keep, setting.grid)}


@reducer(
    "centre-crop",
    "centre crop",
    needs=("places",),
    source="a control; with other radii in Haurum et al., 2023 (Which Tokens to Use?)",
    licence="none is needed",
    build=_crop,
    exceptions=_LEVELS,
)
class CentreCrop(Keeping):
    """Keep the R patches nearest to the middle of the grid; of equally near ones the first.

    A token of several patches has no place and goes first.

    grid: g.  norm: how distance is measured, "max" (a square), "l2" (a disc) or "l1" (a diamond).
    """

    def __init__(self, keep: float, grid: int, norm: Literal["max", "l2", "l1"] = "max") -> None:
        super().__init__(keep)
        if norm not in ("max", "l2", "l1"):
            raise ValueError(f"norm {norm!r} is none of max, l2, l1")
        place = torch.arange(grid**2)
        offsets = torch.stack([place // grid, place % grid]).float().sub((grid - 1) / 2).abs()
        radius = {"max": offsets.amax(0), "l2": offsets.square().sum(0), "l1": offsets.sum(0)}[norm]
        self.register_buffer("radius", torch.cat([radius, radius.new_tensor([torch.inf])]), persistent=False)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, nearest to the middle first."""
        radius = self.radius[context.positions]  # position -1 reads the last entry
        order = radius.argsort(dim=1, stable=True)
        return context.select(x, order[:, : self.left(order.shape[1])])


def _half(setting: Setting) -> dict[Place, Reducer]:
    return {setting.layer: HalfResolution(setting.grid)}


@reducer(
    "half-resolution",
    "half resolution",
    needs=("grid",),
    source="a control",
    licence="none is needed",
    differs="Tokens are averaged, not pixels. A tower for pictures of half the side, with resized positions, is "
    "another control: `make reproduce-waveclip-shapes`.",
    build=_half,
    rates=(0.25,),
    exceptions=_LEVELS | {"identity": "it always keeps a quarter"},
)
class HalfResolution(TokenReducer):
    """Replace every two by two patches by their mean, as a tower of half the resolution would see them.

    grid: g, an even number.  proportional: later attention counts each as four.
    ValueError: an odd grid.
    """

    def __init__(self, grid: int, proportional: bool = False) -> None:
        super().__init__()
        if grid % 2:
            raise ValueError(f"a grid of {grid} patches a side has no halves; half-resolution needs an even number")
        self.grid, self.proportional = grid, proportional
        place = torch.arange(grid**2)
        cell = place // grid // 2 * (grid // 2) + place % grid // 2
        self.register_buffer("cell", cell, persistent=False)

    def left(self, patches: int) -> int:
        return patches // 4

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with g²/4 patch tokens. ValueError: not every patch of the grid is there."""
        patches = x.shape[1] - context.leading - context.trailing
        if patches != self.grid**2:
            raise ValueError(
                f"{patches} tokens are not the {self.grid**2} patches of the grid; half-resolution comes before other "
                "reducers"
            )
        cell = self.cell[context.positions]
        return merge_groups(x, context, cell, patches // 4, proportional=self.proportional)

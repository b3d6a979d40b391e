"""Pruning by an order that is given: the golden oracle.

Shapes: B images, N tokens, K patch tokens, R kept, D width.
"""

from __future__ import annotations

from torch import Tensor

from common.reduction import ReductionContext
from patchrank.reducers.base import Keeping


class GoldenOracle(Keeping):
    """Keep the first patches of the golden orders [B,K] of this batch, as a perfect predictor would.

    It stands before the layer for which the orders were made, as the first reducer of its tower.
    """

    def __init__(self, keep: float, order: Tensor) -> None:
        super().__init__(keep)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens. ValueError: orders of another batch or another grid."""
        if self.order.shape != context.positions.shape:
            raise ValueError(
                f"orders {tuple(self.order.shape)} do not fit {tuple(context.positions.shape)} patch tokens; "
                "give the golden orders of this batch, and no other reducer before"
            )
        return context.select(x, self.order[:, : self.left(self.order.shape[1])])

"""Pruning by the class token's attention, and HiRED's form of it.

Shapes: B images, N tokens, K patch tokens, R kept, D width. Over the tiles of a picture: ``patchrank.reducers.tiles``.
"""

from __future__ import annotations

from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, most
from patchrank.reducers.tiles import EvenTiles, HiREDTiles


@reducer(
    "class-attention-after",
    "class attention, after the block",
    place="after",
    needs=("class token",),
    source="Patch Ranking's Figures 1 and 5 (WACV 2025), whose baseline ranks by block 3 after running it",
    licence="its released code (MIT) holds it in comments alone",
    differs="The block runs whole, and its attention chooses what leaves it. `hired` on one picture is the same with "
    "keep·K rounded down.",
)
@reducer(
    "class-attention",
    "class attention",
    needs=("class token",),
    source="the baseline of Patch Ranking's Figures 1 and 5 (WACV 2025)",
    licence="its released code (MIT) holds it in comments alone",
    tiled=EvenTiles.of,
    differs="The paper's comparison ranks by block 3 after running it: `class-attention-after`, block 3.",
)
class ClassAttention(Keeping):
    """Keep the patches to which the class token attends most: top R of a_j = mean over heads of A[class, j].

    The attention is that of the block where this stands. Before block i it chooses what enters that block; in the
    middle, what passes the second half step; after it, what leaves the block.
    """

    def macs(self, call: Call) -> int:
        """The class token's row of attention."""
        return call.class_row

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens, most attended first."""
        attention = context.class_attention()
        return context.select(x, most(attention, self.left(attention.shape[1])))


@reducer(
    "hired",
    "HiRED",
    place="after",
    needs=("class token",),
    source="Arif et al., AAAI 2025 (HiRED)",
    licence="released code MIT",
    tiled=HiREDTiles.of,
    differs="It stands in the last block but one there, behind which a CLIP tower has little left to save. Over tiles, "
    "its code counts the thumbnail's patches in equal runs of rows; here, as the paper has it, in each tile's area. "
    "Shares are rounded so that all pictures keep the same number; there each is rounded down.",
)
class HiRED(ClassAttention):
    """Keep the int(keep·K) patches to which the class token attends most, summed over heads, after a late block.

    Of a picture in m² tiles and a thumbnail, V views, T = int(V·K·keep) tokens stay: min(K, int(T/2)) of the thumbnail,
    and of each tile as its area holds of the thumbnail's int(K/2) most attended patches in the first block.
    """

    def left(self, patches: int) -> int:
        return max(1, int(self.keep * patches))

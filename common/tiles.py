"""Pictures larger than a tower's own: a thumbnail and tiles, each of the tower's size, and one embedding of them all.

Shapes: B images, S image size of the tower, m tiles a side, V = 1 + m² views of a picture (thumbnail first), N tokens,
P leading tokens, K patch tokens of a view, R kept of all V·K, D width, E joint dim.

The first blocks see every view alone. Then a reducer joins what is kept: behind the thumbnail's leading tokens stand
the patch tokens of all views, and the later blocks run on this one sequence. So a picture has one class token and one
embedding. The papers on tiles hand such a sequence to a language model and say nothing of a CLIP. That its own later
blocks read the sequence is the choice here. A tile's patch shows 1/m² of what a thumbnail's patch shows, so attention
counts it as 1/m² of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters.tower import AdaptedTower
from common.reduction import Place, ReducedTower, Reducer, ReductionContext
from common.tower import ImageTower


def tiles_a_side(image_size: int, tower_size: int) -> int:
    """m for pictures of ``image_size`` pixels. ValueError: they are not twice, three times, ... the tower's size."""
    tiles, left = divmod(image_size, tower_size)
    if left or tiles < 2:
        near = max(tiles, 2) * tower_size
        raise ValueError(
            f"pictures of {image_size} px cannot be cut into tiles of the tower's {tower_size} px; use {near} or "
            f"{near + tower_size}"
        )
    return tiles


def cut(images: Tensor, tiles: int) -> Tensor:
    """images [B,3,mS,mS] -> views [B·V,3,S,S]: of each picture the thumbnail, means of m×m pixels, then the tiles."""
    thumbnail = F.avg_pool2d(images, tiles)[:, None]
    parts = images.unflatten(3, (tiles, -1)).unflatten(2, (tiles, -1))  # [B,3,m,S,m,S]
    return torch.cat([thumbnail, parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)], dim=1).flatten(0, 1)


def of_thumbnails(context: ReductionContext, tiles: int) -> ReductionContext:
    """What a reducer at a block knows of the thumbnails alone: a context of B rows instead of B·V."""
    rows = slice(None, None, 1 + tiles**2)
    known = {name: getattr(context, name) for name in ("positions", "centres", "entered", "keys")}
    return replace(context, **{name: value if value is None else value[rows] for name, value in known.items()})


def join(
    x: Tensor, context: ReductionContext, kept: Tensor | None = None, *, tiles: int
) -> tuple[Tensor, ReductionContext]:
    """Tokens x [B·V,N,D] of the views -> one sequence a picture [B,P+R,D], and its context.

    kept: long [B,R], places among the V·K patch tokens of a picture; None: all of them.
    In the context, positions are those places, and sizes are shares of a thumbnail's patch.
    """
    assert context.sizes is None and context.bias is None and not context.trailing, "no reducer ran before"
    views, patches = 1 + tiles**2, context.patches(x)
    count = patches.shape[1]
    if kept is None:
        kept = torch.arange(views * count, device=x.device).expand(x.shape[0] // views, -1)

    def chosen(values: Tensor) -> Tensor:
        """[B·V,K,...] -> [B,R,...]."""
        values = values.unflatten(0, (-1, views)).flatten(1, 2)
        return values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1]))

    x = torch.cat([x[::views, : context.leading], chosen(patches)], dim=1)
    sizes = torch.where(kept < count, 1.0, tiles**-2.0).to(x.dtype)
    return x, replace(
        context,
        positions=kept,
        sizes=sizes,
        bias=F.pad(sizes.log(), (context.leading, 0))[:, None, None],
        centres=None if context.centres is None else chosen(context.centres),
        images=None,
        noted=None,
    )


class TiledTower(nn.Module):
    """An image tower for pictures of m times its own size, cut into a thumbnail and m² tiles.

    tower: see ``ReducedTower``.
    image_size: m·S.
    reducers: by their ``Place``, one of which joins the views; None: all tokens are joined after a quarter of the
        blocks.
    A tower whose attention reads places takes those that tokens have in their own view.
    ValueError: see ``tiles_a_side``.
    """

    def __init__(
        self,
        tower: ImageTower | AdaptedTower,
        image_size: int,
        reducers: Mapping[Place, Reducer] | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.image_size = tower, image_size
        self.tiles = tiles_a_side(image_size, tower.image_size)
        if reducers is None:
            reducers = {(len(tower.transformer.resblocks) // 4, "after"): partial(join, tiles=self.tiles)}
        self.reduced = ReducedTower(tower, reducers)

    def whole_tower(self) -> ImageTower | AdaptedTower:
        """The tower that sees each view."""
        return self.tower

    def run(self, images: Tensor) -> tuple[Tensor, ReductionContext]:
        """images [B,3,mS,mS] -> tokens [B,P+R,D] after the last block, and their context.

        ValueError: another size, or reducers that do not make one sequence of a picture's views.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels given to tiles of {self.image_size}; resize them"
            )
        x, context = self.reduced.run(cut(images, self.tiles))
        if x.shape[0] != images.shape[0]:
            raise ValueError(
                f"{images.shape[0]} pictures of {self.tiles}×{self.tiles} tiles came out as {x.shape[0]} sequences; "
                f"give a reducer that joins {1 + self.tiles**2} views, such as partial(join, tiles={self.tiles})"
            )
        return x, context

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,mS,mS] -> z [B,E], not normalised."""
        x, context = self.run(images)
        return self.reduced.pool(x, context)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,mS,mS] -> z [B,E], of length 1 unless ``normalize`` is False."""
        z = self(images)
        return F.normalize(z, dim=-1) if normalize else z

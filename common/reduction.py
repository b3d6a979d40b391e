"""The one form of every token reducer, and the tower that runs reducers between blocks.

Shapes: B images, N tokens, K patch tokens among them, R patch tokens kept, M cached tokens of earlier levels, D width,
H heads, E joint dim.

A reducer is a callable ``(x [B,N,D], context) -> (x [B,N',D], context)``. Before block i it works on what enters
the block; between the half steps of block i (EViT, ToMe, MLIP) on what its attention has left. Pruning,
fusing and merging have this one form, so one counter and one clock measure them all. Tokens in a cache are seen by
the others and never reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.tower import Attention, Block, ImageTower, KVCache

Place = int | tuple[int, str]
"""Where a reducer stands: ``i`` before block i, ``(i, "middle")`` between its two half steps."""


@dataclass(frozen=True)
class ReductionContext:
    """What a reducer knows beside the tokens, which stand as: ``leading``, K patch tokens, ``trailing``.

    positions: long [B,K], each patch token's place in the flattened grid; -1 where one token stands for several.
    sizes: [B,K], how many patches each token stands for; None while each stands for itself.
    leading: tokens before the patches that no reducer touches (the class token).
    trailing: tokens after them that no reducer touches (prompts).
    bias: additive [B,1,1,N] attention mask over the tokens, of the blocks (or block halves) still to come; or None.
        Cached tokens have none.
    block: the block that the reducer stands at.
    entered: [B,N,D], what entered (or will enter) that block.
    keys: [B,H,N,D/H], the block's keys, where its attention has already run; else None.
    past: [B,H,M,D/H], the block's keys of cached tokens; None without a cache.
    """

    positions: Tensor
    sizes: Tensor | None = None
    leading: int = 1
    trailing: int = 0
    bias: Tensor | None = None
    block: Block | None = None
    entered: Tensor | None = None
    keys: Tensor | None = None
    past: Tensor | None = None

    def patches(self, x: Tensor) -> Tensor:
        """The patch tokens [B,K,D] of x [B,N,D]."""
        return x[:, self.leading : x.shape[1] - self.trailing]

    def with_patches(self, x: Tensor, patches: Tensor) -> Tensor:
        """x [B,N,D] with other patch tokens [B,R,D] in the place of its own."""
        parts = [x[:, : self.leading], patches, x[:, x.shape[1] - self.trailing :]]
        return torch.cat(parts if self.trailing else parts[:2], dim=1)

    def select(self, x: Tensor, kept: Tensor) -> tuple[Tensor, ReductionContext]:
        """Only the patch tokens ``kept`` (long [B,R], places among the K), in that order, and their context."""
        patches = self.patches(x)
        x = self.with_patches(x, patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1])))
        bias = self.bias
        if bias is not None:
            row = bias[:, 0, 0, :, None]
            own = self.patches(row).gather(1, kept[..., None])
            bias = self.with_patches(row, own)[:, None, None, :, 0]
        sizes = None if self.sizes is None else self.sizes.gather(1, kept)
        return x, replace(self, positions=self.positions.gather(1, kept), sizes=sizes, bias=bias)

    def class_attention(self) -> Tensor:
        """Attention [B,K] of the class token to the patch tokens in this block, the mean over heads.

        The softmax runs over all M+N tokens; see ``class_logits`` for the cost of that one row.
        """
        assert self.block is not None and self.entered is not None, "only a reducer at a block can ask for attention"
        x = self.entered
        logits = class_logits(self.block.attn, self.block.ln_1(x), self.past)
        if self.bias is not None:
            logits = logits + F.pad(self.bias[:, 0], (logits.shape[-1] - x.shape[1], 0))
        weights = logits.softmax(-1, torch.promote_types(x.dtype, torch.float32)).mean(1)
        return self.patches(weights[:, -x.shape[1] :])


def class_logits(attention: Attention, x: Tensor, past: Tensor | None = None) -> Tensor:
    """Attention logits [B,H,M+N] of the class token, the first of x [B,N,D] (after ``ln_1``), up to a constant a head.

    past: keys [B,H,M,D/H] of tokens that stand before x; None: there are none.

    The row's q·(Wx) is computed as (Wᵀq)·x: N·D·H + 2·D² multiply-adds where the keys alone would cost N·D², and
    the fused kernel stays in use for the other rows. A key's own bias adds the same number to every token's logit,
    so no softmax sees it; ready keys hold it, and there it is taken off. They cost M·D more.
    """
    width, heads = x.shape[-1], attention.heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(x[:, 0], weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(0, 1)  # [H,B,D/H]
    folded = query @ weight[width : 2 * width].unflatten(0, (heads, -1))  # [H,B,D]
    logits = folded.transpose(0, 1) @ x.transpose(1, 2)
    if past is not None:
        own_bias = (query * bias[width : 2 * width].unflatten(0, (heads, 1, -1))).sum(-1)  # [H,B]
        earlier = (past @ query.transpose(0, 1)[..., None]).squeeze(-1) - own_bias.T[..., None]
        logits = torch.cat([earlier, logits], dim=-1)
    return logits * (width // heads) ** -0.5


Reducer = Callable[[Tensor, ReductionContext], tuple[Tensor, ReductionContext]]


def run_reduced(
    blocks: Iterable[Block],
    x: Tensor,
    context: ReductionContext,
    reducers: Mapping[Place, Reducer],
    start: int = 0,
    cache: KVCache | None = None,
) -> tuple[Tensor, ReductionContext]:
    """x [B,N,D] through ``blocks``, the first of which is number ``start``, and the reducers at their places.

    cache: what stands before x and stays whole, M tokens of each block; the tokens of x that a block's attention saw
        are added to it.
    """
    cached = cache is not None and cache.tokens > 0
    for layer, block in enumerate(blocks, start):
        before, middle = reducers.get(layer), reducers.get((layer, "middle"))
        past = cache.keys(layer) if cached else None
        if before is not None:
            x, context = before(x, replace(context, block=block, entered=x, keys=None, past=past))
        mask = context.bias
        if mask is not None and past is not None:
            mask = F.pad(mask, (past.shape[2], 0))
        if middle is None:
            x = block(x, mask, cache, layer)
            continue
        seen = KVCache() if cache is None else cache  # attention leaves its keys there
        entered, x = x, block.attend(x, mask, seen, layer)
        keys = seen.keys(layer)[:, :, -x.shape[1] :]
        x, context = middle(x, replace(context, block=block, entered=entered, keys=keys, past=past))
        x = block.feed_forward(x)
    return x, replace(context, block=None, entered=None, keys=None, past=None)


def check_places(places: Iterable[Place], layers: int) -> None:
    """ValueError: a place that a tower with so many blocks does not have."""
    for place in places:
        layer, half = place if isinstance(place, tuple) else (place, "middle")
        if half != "middle" or not 0 <= layer < layers:
            raise ValueError(
                f"a reducer at {place!r}: places are i or (i, 'middle') with i from 0 to {layers - 1} in this tower"
            )


class ReducedTower(nn.Module):
    """An image tower with reducers in it; without any it equals the tower.

    reducers: by place, see ``Place``. Those that are modules are submodules of this tower.
    ValueError: a place that the tower does not have.
    """

    def __init__(self, tower: ImageTower, reducers: Mapping[Place, Reducer]) -> None:
        super().__init__()
        check_places(reducers, len(tower.transformer.resblocks))
        self.tower, self.reducers = tower, dict(reducers)
        self.reducer_modules = nn.ModuleList(r for r in reducers.values() if isinstance(r, nn.Module))

    def run(self, images: Tensor) -> tuple[Tensor, ReductionContext]:
        """images [B,3,S,S] -> tokens [B,N',D] after the last block, and the context that says which they are."""
        x = self.tower.embed(images)
        places = torch.arange(self.tower.grid**2, device=x.device).expand(x.shape[0], -1)
        return run_reduced(self.tower.transformer.resblocks, x, ReductionContext(places), self.reducers)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.tower.pool(self.run(images)[0])

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> z [B,E], of length one unless ``normalize`` is off."""
        z = self(images)
        return F.normalize(z, dim=-1) if normalize else z

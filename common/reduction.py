"""The common form of all token reducers, and the tower that runs reducers between blocks.

Shapes: B images, N tokens, K patch tokens among them, R patch tokens kept, M cached tokens of earlier levels, D width,
H heads, E joint dim.

A reducer is a callable ``(x [B,N,D], context) -> (x [B,N',D], context)``. It runs before block i, on the block's
input, between the two half steps of block i, on the output of its attention (as EViT and ToMe do), or after block i,
with the attention of that block at hand. Pruning, fusing and merging all have this form, so the same code counts and
times them. Cached tokens are attended to and never reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters.tower import AdaptedBlock, AdaptedTower
from common.attention import KVCache, class_logits
from common.tower import Block, ImageTower

Place = int | tuple[int, str]
"""Where a reducer runs: ``i`` before block i, ``(i, "middle")`` between its half steps, ``(i, "after")`` after it."""


@dataclass(frozen=True)
class ReductionContext:
    """What a reducer knows beside the tokens. Their order is: ``leading`` tokens, K patch tokens, ``trailing`` tokens.

    positions: long [B,K], each patch token's index in the flattened grid; -1 for a token made of several patches.
    sizes: [B,K], the number of patches in each token; None: one patch each.
    leading: number of tokens before the patches that no reducer changes (the class token).
    trailing: number of tokens after the patches that no reducer changes (prompts).
    centres: [B,K,2], the row and column of each token; of a merged one the mean of its parts', weighted as they are.
        None in a tower whose attention does not depend on where tokens stand.
    grid: g, the patches a side; read with ``centres``.
    bias: additive attention mask [B,1,1,N] for all later attention over the tokens, or None. It does not cover
        cached tokens.
    block: the block at which the reducer runs.
    entered: [B,N,D], the input of that block.
    keys: [B,H,N,D/H], the block's keys once its attention has run; None before.
    past: [B,H,M,D/H], the block's keys of cached tokens; None without a cache.
    images: [B,3,S,S], the pictures as the tower takes them; None where tokens are no patches of pixels.
    noted: what a reducer at an earlier block has left for one at a later block; None: nothing.
    """

    positions: Tensor
    sizes: Tensor | None = None
    leading: int = 1
    trailing: int = 0
    centres: Tensor | None = None
    grid: int = 0
    bias: Tensor | None = None
    block: Block | AdaptedBlock | None = None
    entered: Tensor | None = None
    keys: Tensor | None = None
    past: Tensor | None = None
    images: Tensor | None = None
    noted: Tensor | None = None

    def patches(self, x: Tensor) -> Tensor:
        """The patch tokens [B,K,D] of x [B,N,D]."""
        return x[:, self.leading : x.shape[1] - self.trailing]

    def with_patches(self, x: Tensor, patches: Tensor) -> Tensor:
        """x [B,N,D] with its patch tokens replaced by ``patches`` [B,R,D]."""
        parts = [x[:, : self.leading], patches, x[:, x.shape[1] - self.trailing :]]
        return torch.cat(parts if self.trailing else parts[:2], dim=1)

    def select(self, x: Tensor, kept: Tensor) -> tuple[Tensor, ReductionContext]:
        """Keep the patch tokens ``kept`` (long [B,R], indices among the K), in that order, and their context."""
        patches = self.patches(x)
        x = self.with_patches(x, patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1])))
        bias = self.bias
        if bias is not None:
            row = bias[:, 0, 0, :, None]
            bias = self.with_patches(row, self.patches(row).gather(1, kept[..., None]))[:, None, None, :, 0]
        sizes = None if self.sizes is None else self.sizes.gather(1, kept)
        centres = None if self.centres is None else self.centres.gather(1, kept[..., None].expand(-1, -1, 2))
        return x, replace(self, positions=self.positions.gather(1, kept), sizes=sizes, centres=centres, bias=bias)

    @property
    def places(self) -> Tensor | None:
        """Where tokens stand for rotary and relative positions: long [B,K], places in the grid; None without centres.

        A merged token stands at the patch nearest to its centre.
        """
        if self.centres is None:
            return None
        row, column = self.centres.round().long().unbind(-1)
        return row * self.grid + column

    def class_logits(self) -> Tensor:
        """Attention logits [B,H,M+N] of the class token in this block.

        M cached tokens come first; ``common.attention.class_logits`` computes this one row cheaply. In a tower without
        a class token, the query of its pooling head stands for it [B,H,N].
        ValueError: the tower has neither.
        """
        assert self.block is not None and self.entered is not None, "only a reducer at a block has class attention"
        x = self.entered
        if isinstance(self.block, AdaptedBlock):
            logits = self.block.class_logits(x, self.keys, self.past, self.places)
        else:
            logits = class_logits(self.block.attn, self.block.ln_1(x), self.past)
        if self.bias is not None:
            logits = logits + F.pad(self.bias[:, 0], (logits.shape[-1] - x.shape[1], 0))
        return logits

    def class_attention(self) -> Tensor:
        """Attention [B,K] of the class token to the patch tokens in this block, averaged over heads.

        The softmax runs over all M+N tokens. ValueError: see ``class_logits``.
        """
        logits = self.class_logits()
        weights = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).mean(1)
        return self.patches(weights[:, -self.entered.shape[1] :])

    def block_keys(self) -> Tensor:
        """This block's keys [B,H,N,D/H]; before the block they are computed from its input."""
        return self._projected(1, 1)[0] if self.keys is None else self.keys

    def block_values(self) -> Tensor:
        """This block's values [B,H,N,D/H], computed from its input."""
        return self._projected(2, 1)[0]

    def attention(self) -> Tensor:
        """The whole attention [B,H,N,N] of this block: row i is token i's attention to the N present tokens.

        The softmax runs over all M+N tokens. The fused kernel keeps no such matrix, so this computes it again; a
        reducer that needs the class token's row alone takes ``class_attention``.
        """
        if self.keys is None:
            query, key = self._projected(0, 2)
        else:
            (query,), key = self._projected(0, 1), self.keys
        seen = key if self.past is None else torch.cat([self.past, key], dim=2)
        if isinstance(self.block, AdaptedBlock):
            logits = self.block.attention_logits(query, seen, self.places)
        else:
            logits = query @ seen.transpose(-1, -2) * query.shape[-1] ** -0.5
        if self.bias is not None:
            logits = logits + F.pad(self.bias, (logits.shape[-1] - query.shape[2], 0))
        weights = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))
        return weights[..., -query.shape[2] :]

    def _projected(self, first: int, count: int) -> tuple[Tensor, ...]:
        """``count`` of queries (0), keys (1) and values (2) [B,H,N,D/H] of this block's input, from ``first`` on."""
        assert self.block is not None and self.entered is not None, "only a reducer at a block has its projections"
        if isinstance(self.block, AdaptedBlock):
            return self.block.project(self.entered, self.places)[first : first + count]
        attention, width = self.block.attn, self.entered.shape[-1]
        rows = slice(first * width, (first + count) * width)
        parts = F.linear(self.block.ln_1(self.entered), attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        return parts.unflatten(-1, (count, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


Reducer = Callable[[Tensor, ReductionContext], tuple[Tensor, ReductionContext]]


def run_reduced(
    blocks: Iterable[Block | AdaptedBlock],
    x: Tensor,
    context: ReductionContext,
    reducers: Mapping[Place, Reducer],
    start: int = 0,
    cache: KVCache | None = None,
) -> tuple[Tensor, ReductionContext]:
    """Run x [B,N,D] through ``blocks`` and the reducers at their places -> (x [B,N',D], context).

    start: the number of the first block.
    cache: M tokens per block that come before x and are never reduced. Each block adds the tokens of x that its
        attention saw.
    """
    cached = cache is not None and cache.tokens > 0
    for layer, block in enumerate(blocks, start):
        before, middle, after = (reducers.get(place) for place in (layer, (layer, "middle"), (layer, "after")))
        past = cache.keys(layer) if cached else None
        # 1. The reducer before the block sees the block's input.
        if before is not None:
            x, context = before(x, replace(context, block=block, entered=x, keys=None, past=past))
        # 2. The reducer may have changed the bias; cached tokens, which come first, get none.
        mask = context.bias
        if mask is not None and past is not None:
            mask = F.pad(mask, (past.shape[2], 0))
        where = {} if context.centres is None else {"places": context.places}
        # 3. Without a reducer in its middle or after it, the block runs whole.
        if middle is None and after is None:
            x = block(x, mask, cache, layer, **where)
            continue
        # 4. Otherwise attention runs first and leaves its keys in a cache; the reducer sees its output and the keys.
        block_cache = KVCache() if cache is None else cache
        entered, x = x, block.attend(x, mask, block_cache, layer, **where)
        keys = block_cache.keys(layer)[:, :, -x.shape[1] :]
        seen = {"block": block, "entered": entered, "keys": keys, "past": past}
        if middle is not None:
            x, context = middle(x, replace(context, **seen))
        # 5. The feed-forward half runs on the tokens that are left.
        x = block.feed_forward(x)
        if after is not None:
            x, context = after(x, replace(context, **seen))
    return x, replace(context, block=None, entered=None, keys=None, past=None)


def check_places(places: Iterable[Place], layers: int) -> None:
    """Raise ValueError for a place that a tower of ``layers`` blocks does not have, or two that exclude each other."""
    places = set(places)
    for place in places:
        layer, half = place if isinstance(place, tuple) else (place, "middle")
        if half not in ("middle", "after") or not 0 <= layer < layers:
            raise ValueError(
                f"a reducer at {place!r}: places are i, (i, 'middle') and (i, 'after') with i from 0 to {layers - 1} "
                "in this tower"
            )
        if {(layer, "middle"), (layer, "after")} <= places:
            raise ValueError(
                f"reducers in the middle of block {layer} and after it: the second would read attention to tokens that "
                "the first took away; put it before the next block"
            )


class ReducedTower(nn.Module):
    """An image tower that runs reducers between its blocks; without reducers it equals the tower.

    tower: one of this suite, or another library's by ``common.adapters.adapt``.
    reducers: by their ``Place``; those that are modules become submodules of this tower.
    ValueError: a place that the tower does not have.
    """

    def __init__(self, tower: ImageTower | AdaptedTower, reducers: Mapping[Place, Reducer]) -> None:
        super().__init__()
        check_places(reducers, len(tower.transformer.resblocks))
        self.tower, self.reducers = tower, dict(reducers)
        self.reducer_modules = nn.ModuleList(r for r in reducers.values() if isinstance(r, nn.Module))

    def enter(self, images: Tensor) -> tuple[Tensor, ReductionContext]:
        """images [B,3,S,S] -> tokens [B,N,D] before the first block, and their context."""
        x = self.tower.embed(images)
        places = torch.arange(self.tower.grid**2, device=x.device).expand(x.shape[0], -1)
        context = ReductionContext(places, leading=self.tower.leading, images=images)
        if isinstance(self.tower, AdaptedTower) and self.tower.positional:
            grid = self.tower.grid
            centres = torch.stack([places // grid, places % grid], dim=-1).to(x.dtype)
            context = replace(context, centres=centres, grid=grid)
        return x, context

    def run(self, images: Tensor) -> tuple[Tensor, ReductionContext]:
        """images [B,3,S,S] -> tokens [B,N',D] after the last block, and their context."""
        return run_reduced(self.tower.transformer.resblocks, *self.enter(images), self.reducers)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.pool(*self.run(images))

    def pool(self, x: Tensor, context: ReductionContext) -> Tensor:
        """Tokens x [B,N',D] after the last block, with their context, -> z [B,E]."""
        if isinstance(self.tower, AdaptedTower):
            return self.tower.pool(x, context.sizes, context.bias)
        return self.tower.pool(x)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> z [B,E], of length 1 unless ``normalize`` is False."""
        z = self(images)
        return F.normalize(z, dim=-1) if normalize else z

"""Image towers of other libraries under the protocol of ``common.tower``: ``embed -> run_blocks -> pool``.

Shapes: B images, S image size, N tokens, P leading tokens (class token, registers), K patch tokens (N = P + K),
M cached tokens, D width, H heads, d width of a head, E joint dim, g patches a side.

A family of towers states how its modules make queries, keys and values, what follows attention, and how it pools. All
modules and weights are the foreign tower's own: nothing is copied, so training the adapted tower trains the original.
Dropout of patches is left out, since it would hide from a reducer which patches are there.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.attention import KVCache, Mask, fused_attention
from common.tower import Block, BlockOutput, BlockTower

Reader = Callable[[Tensor], Tensor]
"""Attention logits [B,H,N] of a pooling head's query to tokens x [B,N,D] that enter a block."""


class PatchMap(NamedTuple):
    """How a tower embeds patches by one linear map.

    weight: [D,3,p,p], of patches of p pixels a side.  positions: [g²,D], with the map's bias.
    class_token: [D], with its position; None: there is none.
    """

    weight: Tensor
    positions: Tensor
    class_token: Tensor | None


class AdaptedBlock(nn.Module, ABC):
    """A block of another library as the two half steps of ``common.tower.Block``.

    A family implements ``project``, ``output`` and ``feed_forward``.

    positional: attention depends on where tokens stand (rotary or relative positions). The block then reads
        ``places``, long [B,K]: the place of each patch token in the flattened grid; None: all patches in their order.
        Leading and trailing tokens have no place.
    reader: stands for the class token's attention in a tower without one; None: the tower has a class token.
    """

    positional = False

    def __init__(self, source: nn.Module, reader: Reader | None = None) -> None:
        super().__init__()
        self.source, self.reader = source, reader

    __prepare_scriptable__ = Block.__prepare_scriptable__

    @abstractmethod
    def project(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B,H,N,d] of the block's input x [B,N,D]; each depends on its own token alone."""

    @abstractmethod
    def output(self, mixed: Tensor) -> Tensor:
        """What attention adds: mixed values [B,N,Hd] -> [B,N,D]."""

    @abstractmethod
    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half step, x [B,N,D] -> [B,N,D]."""

    def mix(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """x + output(softmax(Q K^T / sqrt(d) + mask) V). x and ``query`` may be of the first tokens alone."""
        mixed = fused_attention(query, key, value, mask)
        return x + self.output(mixed.transpose(1, 2).flatten(2))

    def attend(
        self,
        x: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
        places: Tensor | None = None,
    ) -> Tensor:
        """The first half step, x [B,N,D] -> [B,N,D]; for mask and cache see ``common.attention``."""
        query, key, value = self.project(x, places)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return self.mix(x, query, key, value, mask, places)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        layer: int = 0,
        places: Tensor | None = None,
    ) -> Tensor:
        """Both half steps, x [B,N,D] -> [B,N,D]."""
        return self.feed_forward(self.attend(x, mask, cache, layer, places))

    def attention_logits(self, query: Tensor, key: Tensor, places: Tensor | None = None) -> Tensor:
        """Attention logits [B,H,N,M+N] of queries [B,H,N,d] and keys [B,H,M+N,d]."""
        return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5

    def class_logits(
        self, x: Tensor, keys: Tensor | None = None, past: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Attention logits [B,H,M+N] of the class token, or of the pooling head's query [B,H,N].

        x: [B,N,D], the block's input.  keys: this block's keys of x [B,H,N,d]; None: they are computed.
        past: keys [B,H,M,d] of cached tokens; a pooling head does not read them.
        ValueError: the tower pools by the mean, so it has neither.
        """
        if self.reader is not None:
            return self.reader(x)
        if keys is None:
            query, keys, _ = self.project(x, places)
        else:
            no_places = torch.empty(x.shape[0], 0, dtype=torch.long, device=x.device)
            query, _, _ = self.project(x[:, :1], no_places)
        if past is not None:
            keys = torch.cat([past, keys], dim=2)
        return (query[:, :, :1] @ keys.transpose(-1, -2)).squeeze(2) * query.shape[-1] ** -0.5


class AdaptedTower(BlockTower, ABC):
    """An image tower of another library: the original's modules behind ``embed``, ``run_blocks`` and ``pool``.

    source: the module that holds the original's parts, of which ``stem`` names those that embed.
    image_size, patch_size: S, and the side of a patch in pixels.  grid: g.  width, embed_dim: D, E.
    leading: P.  reads_class: the embedding reads the class token alone.
    positional: see ``AdaptedBlock``.
    ValueError: the grid is not square.
    """

    source: nn.Module
    stem: tuple[str, ...]

    def __init__(
        self,
        blocks: Iterable[AdaptedBlock],
        image_size: tuple[int, int],
        grid: tuple[int, int],
        *,
        width: int,
        embed_dim: int,
        leading: int,
        reads_class: bool,
    ) -> None:
        super().__init__()
        if grid[0] != grid[1] or image_size[0] != image_size[1]:
            raise ValueError(f"a tower for {tuple(image_size)} pixels and {tuple(grid)} patches; both must be square")
        self.image_size, self.grid = image_size[0], grid[0]
        self.patch_size = self.image_size // self.grid
        self.width, self.embed_dim, self.leading, self.reads_class = width, embed_dim, leading, reads_class
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.positional = any(block.positional for block in self.transformer.resblocks)

    @property
    def hidden(self) -> int:
        """The greatest number of values that a linear map of the first block makes of one token."""
        return max(part.out_features for part in self.transformer.resblocks[0].modules() if isinstance(part, nn.Linear))

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,S,S], normalised as the original expects them, -> tokens [B,P+g²,D], leading tokens first."""

    @property
    @abstractmethod
    def ln_pre(self) -> nn.Module:
        """The norm that tokens pass before the first block; an identity where there is none."""

    @abstractmethod
    def patch_map(self) -> PatchMap:
        """How patches are embedded. ValueError: not by one linear map and a position for each patch; it says why."""

    def without_stem(self) -> AdaptedTower:
        """A copy of the blocks and the pooling, for tokens that are embedded elsewhere."""
        copied = copy.deepcopy(self)
        for name in self.stem:
            setattr(copied.source, name, None)
        return copied

    @abstractmethod
    def pool(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [B,N,D] after the last block -> joint embedding [B,E].

        sizes: [B,K], the patches in each token, by which a mean weighs it; None: one each.
        bias: [B,1,1,N], added to the logits of an attention head; None: nothing.
        """

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """As ``BlockTower.run_blocks``; places: see ``AdaptedBlock``."""
        blocks = self.transformer.resblocks
        for layer in range(len(blocks))[start:stop]:
            x = blocks[layer](x, mask, cache, layer, places)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised; equal to the original tower's."""
        return self.pool(self.run_blocks(self.embed(images)))

    def intermediates(self, images: Tensor, layers: Sequence[int]) -> list[BlockOutput]:
        """As ``ImageTower.intermediates``; class attention [B,H,P+g²] is to registers too.

        Without a class token it is that of the pooling head's query, and None where the tower pools by the mean.
        """
        return self.observed_blocks(self.embed(images), layers)

    @property
    def has_class_token(self) -> bool:
        """Whether the first leading token is a class token, not a register."""
        return self.transformer.resblocks[0].reader is None

    def class_logits(self, block: AdaptedBlock, x: Tensor, past: Tensor | None) -> Tensor | None:
        """As ``BlockTower.class_logits``; without a class token those of the pooling head's query [B,H,N], or None."""
        return None if isinstance(block.reader, MeanPooled) else block.class_logits(x, past=past)

    def check_size(self, images: Tensor) -> None:
        """ValueError: the images are not S×S."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels given to a tower for {self.image_size}; resize them"
            )


def mean_of(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """The mean [B,D] of patch tokens [B,K,D], weighted by their sizes [B,K]."""
    if sizes is None:
        return tokens.mean(1)
    weights = (sizes / sizes.sum(1, keepdim=True)).to(tokens.dtype)
    return (weights[:, None] @ tokens).squeeze(1)


class MeanPooled:
    """A reader for towers that pool by the mean, which have no class attention. ValueError: it is asked for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Tensor) -> Tensor:
        raise ValueError(
            f"{self.name} pools by the mean and has no class token, so there is no class attention; take a reducer "
            "that reads features, such as DivPrune or ToMe"
        )

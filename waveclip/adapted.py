"""A WaveTower around another library's image tower: its blocks and its pooling, on wavelet tokens.

Shapes: B images, n tokens of one step, N tokens of all steps, D width, E joint dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.adapters import AdaptedTower
from common.attention import KVCache
from common.tower import BlockOutput, BlockTower
from waveclip.tokenizer import WaveletTokenizer
from waveclip.tower import WaveTower


class AdaptedWaveTower(WaveTower):
    """A copy of an adapted tower that reads wavelet tokens. Make one with ``from_image_tower``.

    Every level is pooled as the original pools: its class token, the mean of its tokens, or the pooling head over its
    tokens. Tokens of a level thus reach the embedding of a later one through attention alone.
    """

    def __init__(self, tokenizer: WaveletTokenizer, tower: AdaptedTower) -> None:
        BlockTower.__init__(self)
        self.tokenizer, self.tower = tokenizer, tower.without_stem()

    @property
    def transformer(self) -> nn.Module:
        """The tower's blocks."""
        return self.tower.transformer

    @property
    def ln_pre(self) -> nn.Module:
        """The norm before the blocks."""
        return self.tower.ln_pre

    def pool(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B,N,D] -> one embedding [B,E] of each step's tokens."""
        steps = x.split(self.mask, dim=1)
        return tuple(self.tower.pool(tokens) for tokens in steps)

    def read(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """A level's embedding [B,E] from its tokens x [B,n,D]; sizes and bias: see ``AdaptedTower.pool``."""
        return self.tower.pool(x, sizes, bias)

    def intermediates(self, images: Tensor, layers: Sequence[int]) -> list[tuple[BlockOutput, ...]]:
        """As ``WaveTower.intermediates``; without a class token as ``AdaptedTower.intermediates``."""
        cache, bands = KVCache(), enumerate(self.tokenizer.decompose(images))
        entered = (self.ln_pre(self.tokenizer.embed(band, step)) for step, band in bands)
        return list(zip(*(self.tower.observed_blocks(x, layers, cache) for x in entered), strict=True))

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """ValueError: a file cannot describe another library's tower."""
        raise ValueError("a WaveTower of another library's tower is not saved here; save its state_dict")

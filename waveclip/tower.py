"""CLIP's image tower on wavelet tokens: one block-causal pass, or level by level over a cache (WAVECLIP, section 3.2).

Shapes: B images, S image size, N tokens of all steps, n tokens of one step, D width, E joint dim, K chosen rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters import AdaptedTower
from common.attention import KVCache
from common.clip import CLIP
from common.reduction import Place, Reducer, ReductionContext, run_reduced
from common.stages import Stage
from common.tower import BlockOutput, BlockTower, ImageTower
from common.weights import load_saved, save_model
from waveclip.gating import MarginGate
from waveclip.progressive import ProgressiveClassifier
from waveclip.tokenizer import Start, WaveletTokenizer
from waveclip.wavelet import Transform


@dataclass(frozen=True)
class WaveState:
    """What a refinement needs: the number of steps done, their keys and values, the bands not yet embedded."""

    done: int
    cache: KVCache
    bands: tuple[Tensor, ...]


class WaveTower(BlockTower):
    """A copy of an image tower that reads wavelet tokens, coarse first, with a class token at every level.

    The attention is equation 1: a step's queries read the keys and values of their own step and of all earlier
    ones, never of later ones. ``forward`` runs all steps at once under that block-causal mask; ``begin`` and
    ``refine`` run one step after another and read the earlier keys and values from a cache. Both give the same
    embeddings, since detail that is added later changes nothing before it.
    """

    def __init__(self, tokenizer: WaveletTokenizer, tower: ImageTower) -> None:
        if isinstance(tower, AdaptedTower):
            raise ValueError("a tower of another library: use AdaptedWaveTower.from_image_tower")
        super().__init__()
        self.tokenizer = tokenizer
        self.ln_pre, self.transformer, self.ln_post = (
            copy.deepcopy(part) for part in (tower.ln_pre, tower.transformer, tower.ln_post)
        )
        self.proj = nn.Parameter(tower.proj.detach().clone())

    @classmethod
    def from_image_tower(
        cls,
        tower: ImageTower | AdaptedTower,
        levels: int = 1,
        wavelet: str = "haar",
        shared_class_token: bool = False,
        *,
        transform: Transform = "conv",
        start: Start = "teacher",
        detail_scale: float = 4.0,
    ) -> WaveTower:
        """A WaveTower that starts as ``tower``, on its device and in its dtype; see ``WaveletTokenizer``.

        ValueError: a size that ``levels`` halvings and the patch do not divide, an unfit wavelet, or a tower of
        another library, for which there is ``AdaptedWaveTower``.
        """
        arguments = (levels, wavelet, shared_class_token, transform, start, detail_scale)
        return cls(WaveletTokenizer(tower, *arguments), tower)

    @property
    def steps(self) -> int:
        """S + 1, the number of embeddings, coarse to fine."""
        return self.tokenizer.steps

    @property
    def mask(self) -> tuple[int, ...]:
        """The mask of equation 1, block-causal: how many tokens enter at each step; see ``common.attention.Mask``."""
        return tuple(self.tokens_in(step) for step in range(self.steps))

    def tokens_in(self, step: int) -> int:
        """n, the tokens that enter at one step, its class token included."""
        return self.tokenizer.tokens_in(step)

    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> tokens of all steps [B,N,D], coarse first, after ``ln_pre``."""
        bands = self.tokenizer.decompose(images)
        return self.ln_pre(torch.cat([self.tokenizer.embed(band, step) for step, band in enumerate(bands)], dim=1))

    def pool(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B,N,D] -> one embedding [B,E] of each step's class token."""
        places = [0, *accumulate(self.mask[:-1])]
        return tuple((self.ln_post(x[:, places]) @ self.proj).unbind(1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B,3,S,S] -> (z_0, ..., z_S), each [B,E], by one pass under the mask of equation 1."""
        return self.pool(self.run_blocks(self.embed(images), mask=self.mask))

    def begin(self, images: Tensor, reducers: Mapping[Place, Reducer] | None = None) -> tuple[Tensor, WaveState]:
        """images [B,3,S,S] -> z_0 [B,E] from the coarse tokens alone, and the state to refine.

        reducers: of this level's tokens, see ``ReducedWaveTower``.
        """
        return self._advance(WaveState(0, KVCache(), tuple(self.tokenizer.decompose(images))), reducers)

    def refine(
        self, state: WaveState, rows: Tensor | None = None, reducers: Mapping[Place, Reducer] | None = None
    ) -> tuple[Tensor, WaveState]:
        """The next level's z [K,E] and state; only the new tokens are computed (equation 1 over the cache).

        rows: long [K], which rows of the state go on; None: all. The given state stays valid.
        reducers: of this level's tokens, see ``ReducedWaveTower``.
        ValueError past the last level.
        """
        if not state.bands:
            raise ValueError(f"all {self.steps} levels of this state are done; begin with the pictures again")
        bands = state.bands if rows is None else tuple(band[rows] for band in state.bands)
        return self._advance(WaveState(state.done, state.cache.select(rows), bands), reducers)

    def _advance(self, state: WaveState, reducers: Mapping[Place, Reducer] | None) -> tuple[Tensor, WaveState]:
        """Embed the next step's tokens and run them; the state's cache grows in place.

        No mask is needed: the cache holds the earlier steps alone, and a step's tokens all see each other.
        """
        band, *rest = state.bands
        x = self.ln_pre(self.tokenizer.embed(band, state.done))
        if reducers:
            leading = self.tokenizer.leading
            places = torch.arange(x.shape[1] - leading, device=x.device).expand(x.shape[0], -1)
            context = ReductionContext(places, leading=leading)
            x, context = run_reduced(self.transformer.resblocks, x, context, reducers, cache=state.cache)
            z = self.read(x, context.sizes, context.bias)
        else:
            z = self.read(self.run_blocks(x, cache=state.cache))
        return z, WaveState(state.done + 1, state.cache, tuple(rest))

    def read(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """A level's embedding [B,E] from its tokens x [B,n,D] after the last block: that of its class token.

        sizes, bias: of reduced tokens, which the class token's embedding does not need.
        """
        return self.ln_post(x[:, 0]) @ self.proj

    def intermediates(self, images: Tensor, layers: Sequence[int]) -> list[tuple[BlockOutput, ...]]:
        """images [B,3,S,S] -> for each of ``layers`` the ``BlockOutput`` of every step, coarse to fine.

        A step's patches are its own; they stand by band, then by place. Its class attention [B,H,M+n] is to the M
        tokens of all earlier steps and to its own n, its class token at place M.
        """
        cache = KVCache()
        steps = [
            self.observed_blocks(self.ln_pre(self.tokenizer.embed(band, step)), layers, cache)
            for step, band in enumerate(self.tokenizer.decompose(images))
        ]
        return list(zip(*steps, strict=True))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> the last level's embedding [B,E], of length 1 unless told otherwise."""
        z, state = self.begin(images)
        while state.bands:
            z, state = self.refine(state)
        return F.normalize(z, dim=-1) if normalize else z

    def classifier(
        self, class_embeddings: Tensor, logit_scale: float | Tensor, threshold: float
    ) -> ProgressiveClassifier:
        """A zero-shot classifier on this tower; an image exits when its margin reaches ``threshold``."""
        return ProgressiveClassifier(self, class_embeddings, logit_scale, MarginGate(threshold))

    def stages(self) -> list[Stage]:
        """One graph a level; the cache and the bands to come pass between the graphs as flat tensors."""
        layers = range(len(self.transformer.resblocks))
        stages, inputs = [], ("images",)
        for step in range(self.steps):
            later = range(step + 1, self.steps)
            names = [f"{part}_{layer}" for layer in layers for part in ("key", "value")] if later else []
            # A graph's inputs and outputs must not share a name, so each says which level it comes from.
            state = tuple(f"{name}_of_level_{step}" for name in [*names, *(f"band_{other}" for other in later)])
            stages.append(Stage(f"level_{step}", Level(self, step), inputs, ("embedding", *state)))
            inputs = state
        return stages

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write a self-describing safetensors file. architecture: that of the CLIP whose image tower this copies."""
        tokenizer = self.tokenizer
        wave = {
            "levels": tokenizer.levels,
            "wavelet": tokenizer.wavelet,
            "shared_class_token": len(tokenizer.class_tokens) == 1,
        }
        save_model(self, path, {"architecture": architecture, "wave": wave}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> WaveTower:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> WaveTower:
            return cls.from_image_tower(CLIP(record["architecture"]).image_tower, **record["wave"])

        problem = "does not describe a WaveTower; convert its training checkpoint first"
        return load_saved(path, {"architecture", "wave"}, problem, build)


class Level(nn.Module):
    """One step of a WaveTower from flat tensors to flat tensors; see ``WaveTower.stages``."""

    def __init__(self, wave: nn.Module, step: int) -> None:
        super().__init__()
        self.wave, self.step = wave, step

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.step == 0:
            z, state = self.wave.begin(*tensors)
        else:
            cached = len(tensors) - (self.wave.steps - self.step)  # a band for each step to come, this one too
            cache = KVCache.from_flat(tensors[:cached])
            z, state = self.wave.refine(WaveState(self.step, cache, tensors[cached:]))
        # Nothing reads the cache of the last level.
        handed_on = (*state.cache.flat(), *state.bands) if state.bands else ()
        return F.normalize(z, dim=-1), *handed_on

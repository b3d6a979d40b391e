"""Growing a WaveTower: a tower for larger images starts from the levels of one for smaller images.

Shapes: G side of the coarser tower's patch grid, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from waveclip.adapted import AdaptedWaveTower
from waveclip.tower import WaveTower


@torch.no_grad()
def adopt_levels(wave: WaveTower, coarser: WaveTower) -> None:
    """Initialise the coarse levels of ``wave`` from ``coarser``.

    ``coarser`` has k levels fewer and was trained at 1/2^k of the resolution. With haar the bands of an image's
    coarse levels are the bands of the image halved k times, so these levels of ``wave`` give exactly the embeddings
    of ``coarser``; a longer filter only halves differently. The finer levels start from the last level of
    ``coarser``: they take its filters and its class token and keep their own band embeddings. Each position of
    ``coarser`` is copied to the 2^k x 2^k patches that cover the same place.
    ValueError: the towers do not fit together.
    """
    target, source = wave.tokenizer, coarser.tokenizer
    new = target.levels - source.levels  # k
    _check(wave, coarser, new)
    # Filters, coarse first; the new levels repeat the last known one.
    target.coarse.copy_(source.coarse)
    for level, detail in enumerate(target.details):
        detail.copy_(source.details[min(level, source.levels - 1)])
    # What is added to the patches: bands, class tokens, positions.
    target.band_embedding[: len(source.band_embedding)] = source.band_embedding
    last = len(source.class_tokens) - 1
    target.class_tokens.copy_(source.class_tokens[torch.arange(len(target.class_tokens)).clamp(max=last)])
    target.positions.copy_(_repeated(source.positions, 2**new))
    for part in ("ln_pre", "transformer", "ln_post"):
        getattr(wave, part).load_state_dict(getattr(coarser, part).state_dict())
    wave.proj.copy_(coarser.proj)


def _repeated(positions: Tensor, times: int) -> Tensor:
    """positions [G²,D] -> [(times G)²,D], each repeated over times x times cells, so that their mean is unchanged."""
    grid = round(len(positions) ** 0.5)
    cells = positions.unflatten(0, (grid, grid))
    return cells.repeat_interleave(times, 0).repeat_interleave(times, 1).flatten(0, 1)


def _check(wave: WaveTower, coarser: WaveTower, new: int) -> None:
    target, source = wave.tokenizer, coarser.tokenizer
    for tower in (wave, coarser):
        if isinstance(tower, AdaptedWaveTower):
            raise ValueError("levels are adopted between towers of this suite; one of these is another library's")
    if new < 1 or source.image_size * 2**new != target.image_size:
        raise ValueError(
            f"a tower of {source.levels} levels at {source.image_size} px cannot begin one of {target.levels} at "
            f"{target.image_size} px; give one that has a level fewer for every halving of the image"
        )
    for what, one, other in (
        ("wavelet", target.wavelet, source.wavelet),
        ("patch size", target.patch_size, source.patch_size),
        ("one class token for all levels", len(target.class_tokens) == 1, len(source.class_tokens) == 1),
        *((what, one, _shape(coarser)[what]) for what, one in _shape(wave).items()),
    ):
        if one != other:
            raise ValueError(f"{what}: {one} here, {other} in the tower of fewer levels; they must be the same")


def _shape(tower: WaveTower) -> dict[str, int | str]:
    """What the weights of a tower's blocks presume; its heads and activation alone change no weight's shape."""
    blocks, (width, embed_dim) = tower.transformer.resblocks, tower.proj.shape
    return {
        "depth": len(blocks),
        "width": width,
        "embedding dim": embed_dim,
        "heads": blocks[0].attn.heads,
        "hidden width": blocks[0].mlp.c_fc.out_features,
        "activation": type(blocks[0].mlp.gelu).__name__,
    }

"""Growing a WaveTower: a tower for larger pictures that starts from the levels of one for smaller ones.

Shapes: G grid of the coarser tower's pictures, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from waveclip.tower import WaveTower


@torch.no_grad()
def adopt_levels(wave: WaveTower, coarser: WaveTower) -> None:
    """Make a tower of fewer levels, on pictures as many halvings smaller, the first levels of ``wave``.

    For haar the bands of a picture's coarse levels are the bands of the picture halved, so ``wave`` begins with
    exactly what ``coarser`` says of the halved picture, level for level; a longer filter only halves differently.
    What is finer starts as the coarser tower's last level: the same filters, bands told apart as ``wave`` had them,
    its class token. Of a location every pixel's position is that of the location.
    ValueError: towers that do not fit together.
    """
    own, theirs = wave.tokenizer, coarser.tokenizer
    known, new = theirs.levels, own.levels - theirs.levels
    _check(wave, coarser, new)
    own.coarse.copy_(theirs.coarse)
    for level, detail in enumerate(own.details):
        detail.copy_(theirs.details[min(level, known - 1)])
    own.band_embedding[: len(theirs.band_embedding)] = theirs.band_embedding
    last = len(theirs.class_tokens) - 1
    own.class_tokens.copy_(theirs.class_tokens[torch.arange(len(own.class_tokens)).clamp(max=last)])
    own.positions.copy_(_repeated(theirs.positions, 2**new))
    for part in ("ln_pre", "transformer", "ln_post"):
        getattr(wave, part).load_state_dict(getattr(coarser, part).state_dict())
    wave.proj.copy_(coarser.proj)


def _repeated(positions: Tensor, times: int) -> Tensor:
    """positions [G²,D] -> [(times G)²,D], each for times x times cells, whose mean it stays."""
    grid = round(len(positions) ** 0.5)
    cells = positions.unflatten(0, (grid, grid))
    return cells.repeat_interleave(times, 0).repeat_interleave(times, 1).flatten(0, 1)


def _check(wave: WaveTower, coarser: WaveTower, new: int) -> None:
    own, theirs = wave.tokenizer, coarser.tokenizer
    if new < 1 or theirs.image_size * 2**new != own.image_size:
        raise ValueError(
            f"a tower of {theirs.levels} levels at {theirs.image_size} px cannot begin one of {own.levels} at "
            f"{own.image_size} px; it takes a level fewer for every halving of the picture"
        )
    for what, one, other in (
        ("wavelet", own.wavelet, theirs.wavelet),
        ("patch size", own.patch_size, theirs.patch_size),
        ("one class token for all levels", len(own.class_tokens) == 1, len(theirs.class_tokens) == 1),
        ("depth", len(wave.transformer.resblocks), len(coarser.transformer.resblocks)),
        ("widths", wave.proj.shape, coarser.proj.shape),
    ):
        if one != other:
            raise ValueError(f"{what}: {one} here, {other} in the tower of fewer levels; they must be the same")

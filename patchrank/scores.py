"""The parts of a golden ranking (Phase I): keep counts, blocks of the patch grid, the paper's three scores.

Shapes: B images, N patch tokens, G grid side (N = G²), W blocks, E joint dim, C classes.

The paper's scores say how safely a block can be removed; the highest goes first. Every score here is one minus the
paper's, the cost of the removal, so that high = keep as everywhere in this suite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.contrastive import scaled_cosines

Score = Literal["feature", "label", "confidence"]
"""The paper's feature preservation, label-driven and maximum confidence scores."""

_NEEDS = {
    "feature": (),
    "label": ("class_embeddings", "logit_scale", "labels"),
    "confidence": ("class_embeddings", "logit_scale"),
}


def keep_count(keep: float, tokens: int) -> int:
    """How many of ``tokens`` a keep rate keeps: rounded to the nearest (halves up), at least one of any.

    196 tokens: 176, 157, 137, 118, 98 at .9 to .5.  ValueError: a rate outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is not in (0, 1]; it is the share of patch tokens that stays")
    return min(tokens, max(1, math.floor(keep * tokens + 0.5)))


def grid_blocks(grid: int, block: int, stride: int = 1) -> Tensor:
    """bool [W,N]: the patches of a G×G grid in each ``block``×``block`` window, windows ``stride`` apart.

    With stride 1 windows slide, as in the paper; with stride = block they tile, as in its released code.
    ValueError: no such window, or windows that do not cover the grid exactly.
    """
    if not 1 <= block <= grid:
        raise ValueError(f"block {block} is not between 1 and the grid's side {grid}")
    if not 1 <= stride <= block or (grid - block) % stride:
        fit = [step for step in range(1, block + 1) if (grid - block) % step == 0]
        raise ValueError(
            f"blocks of {block} at stride {stride} do not cover a {grid}x{grid} grid evenly; use a stride of {fit}"
        )
    place = torch.arange(grid)
    first = torch.arange(0, grid - block + 1, stride)[:, None]
    inside = (first <= place) & (place < first + block)  # [G',G], along either side
    return (inside[:, None, :, None] & inside[None, :, None, :]).reshape(-1, grid * grid)


def token_scores(costs: Tensor, removed: Tensor) -> Tensor:
    """The mean cost [B,N] of the blocks that hold a token; 0 for a token in no block.

    costs: [B,W], of removing each block.  removed: bool [B,W,N], the tokens of each block.
    """
    weights = removed.to(costs.dtype)
    return (costs[..., None] * weights).sum(1) / weights.sum(1).clamp(min=1)


def feature_cost(full: Tensor, pruned: Tensor) -> Tensor:
    """1 - cos of full [B,1,E] and pruned [B,W,E] embeddings -> [B,W] (feature preservation).

    Computed as half the squared distance of the unit vectors, which stays precise where the cosine is near one.
    """
    return 0.5 * (F.normalize(full, dim=-1) - F.normalize(pruned, dim=-1)).square().sum(-1)


def label_cost(log_posterior: Tensor, labels: Tensor) -> Tensor:
    """1 - P(label | pruned) -> [B,W] (label-driven).  log_posterior: [B,W,C];  labels: long [B]."""
    index = labels[:, None, None].expand(*log_posterior.shape[:2], 1)
    return -torch.expm1(log_posterior.gather(-1, index).squeeze(-1))


def confidence_cost(log_posterior: Tensor) -> Tensor:
    """1 - max over classes of P(class | pruned): [B,W,C] -> [B,W] (maximum confidence)."""
    return -torch.expm1(log_posterior.amax(-1))


def removal_costs(
    score: Score,
    full: Tensor,
    pruned: Tensor,
    class_embeddings: Tensor | None = None,
    logit_scale: Tensor | float | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The cost of each removal by one score: full [B,E], pruned [B,W,E] -> [B,W].

    class_embeddings: [C,E], of unit length.  logit_scale: the multiplier, already exponentiated.
    labels: long [B].  The arguments that the score needs must be given, see ``check_score``.
    """
    wide = torch.promote_types(full.dtype, torch.float32)
    full, pruned = full.to(wide), pruned.to(wide)
    if score == "feature":
        return feature_cost(full[:, None], pruned)
    logits = scaled_cosines(F.normalize(pruned, dim=-1), class_embeddings.to(pruned), logit_scale)
    log_posterior = logits.log_softmax(-1)
    return confidence_cost(log_posterior) if score == "confidence" else label_cost(log_posterior, labels)


def check_score(score: Score, given: Mapping[str, Any]) -> None:
    """ValueError: an unknown score, or an argument that it needs is not among those ``given``."""
    if score not in _NEEDS:
        raise ValueError(f"score {score!r} is none of {', '.join(_NEEDS)}")
    missing = [name for name in _NEEDS[score] if given.get(name) is None]
    if missing:
        raise ValueError(f"score {score!r} needs {' and '.join(missing)}; only 'feature' needs neither text nor labels")

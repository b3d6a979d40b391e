"""DynamicViT (Rao et al., NeurIPS 2021), a baseline: the tower whose prediction modules choose the tokens that stay.

Shapes: B images, S image size, N tokens (class token first), K patch tokens, S stages, H heads, D width, E joint dim.

Inference keeps a fixed number of tokens at each stage (``patchrank.reducers.dynamicvit``). Training draws D_j in {0, 1}
for every patch from the modules' probabilities by the straight-through Gumbel softmax; a dropped token stays dropped.
Dropped tokens are masked from attention, so that shapes are static and gradients reach the draws:
A_ij = exp(P_ij) G_ij / Σ_k exp(P_ik) G_ik, where P = QK^T/√d, G_ij = D_j for i ≠ j and G_ii = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.clip import CLIP
from common.ranks import of_this_rank
from common.reduction import ReducedTower
from common.tower import Block, ImageTower
from common.weights import load_saved, save_model
from patchrank.reducers.dynamicvit import keep_predictors, predicted_reducers

Draw = Callable[[Tensor], Tensor]
"""Log-probabilities [B,K,2] of keeping and dropping -> which tokens are kept, 1 or 0 [B,K]."""


class MaskedPass(NamedTuple):
    """The result of a training pass.

    z: [B,E], not normalised.  patches: [B,K,D], all patch tokens after the tower's last norm.
    kept: [S,B,K], 1 for the tokens that each stage left, with the gradient of the draws.
    """

    z: Tensor
    patches: Tensor
    kept: Tensor


def gumbel_draw(log_probabilities: Tensor) -> Tensor:
    """Draw from log-probabilities [B,K,2] -> 1 for kept, 0 for dropped [B,K]; the gradient is the softmax's.

    It is ``F.gumbel_softmax`` with hard draws, of which every rank has its own.
    """
    wide = log_probabilities.to(torch.promote_types(log_probabilities.dtype, torch.float32))
    drawn = of_this_rank(lambda rows: wide.new_empty(rows, *wide.shape[1:]).exponential_(), len(wide))
    soft = (wide - drawn.log()).softmax(-1)
    kept = (soft[..., 0] >= soft[..., 1]).to(soft.dtype)
    return kept - soft[..., 0].detach() + soft[..., 0]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, alive: Tensor) -> Tensor:
    """Attention [B,H,N,d] of queries, keys and values [B,H,N,d] in which only the tokens of ``alive`` [B,N] are seen.

    Every token also sees itself. The equation stands at the top of this file.
    """
    logits = (query @ key.transpose(-1, -2)).to(alive.dtype) * query.shape[-1] ** -0.5
    itself = torch.eye(alive.shape[1], dtype=alive.dtype, device=alive.device)
    seen = alive[:, None, None] * (1 - itself) + itself
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * seen
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(alive.dtype).tiny)
    return weights.to(value.dtype) @ value


def masked_block(block: Block, x: Tensor, alive: Tensor) -> Tensor:
    """A block on x [B,N,D] whose attention sees the tokens of ``alive`` [B,N] alone -> [B,N,D]."""
    attention = block.attn
    query, key, value = attention.project(block.ln_1(x)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    seen = masked_attention(query, key, value, alive)
    return block.feed_forward(x + attention.out_proj(seen.transpose(1, 2).flatten(2)))


class DynamicViTTower(ReducedTower):
    """An image tower that prunes by prediction modules at three places; at keep 1 it equals the tower.

    The given tower is shared, not copied.

    predictors: the modules by the number of their block; None: untrained ones at the published places.
    keep: ρ in (0, 1]; the stages keep int(K ρ), int(K ρ²) and int(K ρ³) of the K patches.
    ValueError: a rate out of range, or a tower of another library.
    """

    prunable = True

    def __init__(self, tower: ImageTower, predictors: nn.ModuleDict | None = None, keep: float = 0.7) -> None:
        if not isinstance(tower, ImageTower):
            raise ValueError(f"DynamicViT trains this suite's ImageTower; {type(tower).__name__} is another library's")
        if predictors is None:
            predictors = keep_predictors(tower.width, len(tower.transformer.resblocks))
        super().__init__(tower, predicted_reducers(predictors, keep, tower.grid**2))
        self.keep = keep

    @property
    def predictors(self) -> nn.ModuleDict:
        """The prediction modules, by the number of their block."""
        return nn.ModuleDict({str(block): reducer.predictor for block, reducer in self.reducers.items()})

    def at(self, keep: float) -> DynamicViTTower:
        """This tower at another base rate, with shared weights. ValueError: see the class."""
        return DynamicViTTower(self.tower, self.predictors, keep).train(self.training)

    def masked(self, images: Tensor, draw: Draw = gumbel_draw) -> MaskedPass:
        """The training pass of images [B,3,S,S]: tokens are drawn and masked, and all are computed."""
        x = self.tower.embed(images)
        wide = torch.promote_types(x.dtype, torch.float32)
        alive, stages = torch.ones(x.shape[:2], dtype=wide, device=x.device), []
        for number, block in enumerate(self.tower.transformer.resblocks):
            # 1. At a stage, draw among the tokens that are still there; the class token always stays.
            if number in self.reducers:
                present = alive[:, 1:]
                kept = draw(self.reducers[number].predictor(x[:, 1:], present)).to(wide) * present
                alive = torch.cat([alive[:, :1], kept], dim=1)
                stages.append(kept)
            # 2. Before the first stage nothing is masked, and the fused kernel serves.
            x = masked_block(block, x, alive) if stages else block(x)
        return MaskedPass(self.tower.pool(x), self.tower.ln_post(x)[:, 1:], torch.stack(stages))

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write a self-describing safetensors file. architecture: that of the CLIP whose image tower this is."""
        save_model(self, path, {"architecture": architecture, "dynamicvit": {"keep": self.keep}}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> DynamicViTTower:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> DynamicViTTower:
            return cls(CLIP(record["architecture"]).image_tower, **record["dynamicvit"])

        problem = "does not describe a DynamicViTTower; convert its training checkpoint first"
        return load_saved(path, {"architecture", "dynamicvit"}, problem, build)


def ratio_loss(kept: Tensor, keep: float) -> Tensor:
    """The mean over images and stages of (ρ^s - the share of tokens that stage s keeps)².  kept: [S,B,K]; keep: ρ."""
    wanted = keep ** torch.arange(1, len(kept) + 1, dtype=kept.dtype, device=kept.device)
    return (kept.mean(-1) - wanted[:, None]).square().mean()


def token_loss(patches: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """The mean square of patches - target [B,K,D] over the tokens of ``kept`` [B,K] and the channels; 0 for no token.

    The choice of the tokens gets no gradient from it, as released.
    """
    kept = kept.detach()
    error = (patches.to(kept.dtype) - target.to(kept.dtype)).square().mean(-1)
    return (error * kept).sum() / kept.sum().clamp(min=1)

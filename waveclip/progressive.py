"""Batched early exit: after each level only the undecided pictures go on (WAVECLIP, section 3.3).

Shapes: B images, A undecided images, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.contrastive import scaled_cosines

if TYPE_CHECKING:
    from waveclip.tower import WaveTower


@dataclass(frozen=True)
class Prediction:
    """scores: class probabilities [B,C]; exit_step: the level that answered, long [B]; tokens: entered, long [B]."""

    scores: Tensor
    exit_step: Tensor
    tokens: Tensor


class ProgressiveClassifier(nn.Module):
    """Zero-shot classification that refines only the pictures whose gate stays closed.

    wave: the tower.  class_embeddings: [C,E], normalised.
    logit_scale: the multiplier of the cosines, already exponentiated.
    gate: probabilities [B,C] -> boolean [B], True where the answer stands; not asked at the last level.
    """

    def __init__(
        self,
        wave: WaveTower,
        class_embeddings: Tensor,
        logit_scale: float | Tensor,
        gate: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.wave, self.gate = wave, gate
        self.register_buffer("class_embeddings", class_embeddings, persistent=False)
        self.register_buffer("logit_scale", torch.as_tensor(logit_scale).detach(), persistent=False)

    def probabilities(self, z: Tensor) -> Tensor:
        """z [A,E] -> softmax of the scaled cosines, [A,C] (eq. 2), at least in fp32."""
        return scaled_cosines(F.normalize(z, dim=-1), self.class_embeddings, self.logit_scale).softmax(dim=-1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Prediction:
        """images [B,3,S,S] -> Prediction, in the order of the images.

        The undecided rows' cache is compacted before each level, so what a decided picture would still
        have cost is not computed; the one synchronisation per level is the list of those rows.
        """
        z, state = self.wave.begin(images)
        live = torch.arange(len(images), device=images.device)
        entered = self.wave.tokens_in(0)
        probabilities = self.probabilities(z)
        scores, exit_step = torch.empty_like(probabilities), torch.zeros_like(live)
        tokens = torch.zeros_like(live)
        for step in range(self.wave.steps):
            # Later levels overwrite, so every live row may be written before the gate is asked.
            scores[live], exit_step[live], tokens[live] = probabilities, step, entered
            if step == self.wave.steps - 1:
                break
            rows = (~self.gate(probabilities)).nonzero().squeeze(1)
            if not len(rows):
                break
            live = live[rows]
            z, state = self.wave.refine(state, rows)
            entered += self.wave.tokens_in(step + 1)
            probabilities = self.probabilities(z)
        return Prediction(scores, exit_step, tokens)

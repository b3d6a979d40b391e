"""Batched early exit: after each level only the undecided images go on (WAVECLIP, section 3.3).

Shapes: B images, A undecided images, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.contrastive import scaled_cosines


class ProgressiveTower(Protocol):
    """A tower that embeds images level by level, as ``WaveTower`` and ``ReducedWaveTower`` do."""

    @property
    def steps(self) -> int:
        """The number of levels."""

    def tokens_in(self, step: int) -> int:
        """The tokens that enter at one level."""

    def begin(self, images: Tensor) -> tuple[Tensor, Any]:
        """images [B,3,S,S] -> the coarsest embedding [B,E], and the state to refine."""

    def refine(self, state: Any, rows: Tensor) -> tuple[Tensor, Any]:
        """The next level's embedding [A,E] and state, of the state's ``rows`` (long [A]) alone."""


@dataclass(frozen=True)
class Prediction:
    """What early exit answers for B images.

    scores: class probabilities [B,C].  exit_step: the level that answered, long [B].  tokens: how many entered the
    tower up to that level, long [B].
    """

    scores: Tensor
    exit_step: Tensor
    tokens: Tensor


class ProgressiveClassifier(nn.Module):
    """Zero-shot classification that refines only the images whose gate stays closed (section 3.3).

    wave: the tower.  class_embeddings: [C,E], normalised.
    logit_scale: the multiplier of the cosines, already exponentiated.
    gate: probabilities [B,C] -> boolean [B], True where the answer stands; not asked at the last level.
    """

    def __init__(
        self,
        wave: ProgressiveTower,
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

        Each level computes the undecided images alone: their cache is compacted first. The list of these images is
        the one synchronisation with the device per level.
        """
        z, state = self.wave.begin(images)
        live = torch.arange(len(images), device=images.device)
        entered = self.wave.tokens_in(0)
        probabilities = self.probabilities(z)
        scores, exit_step = torch.empty_like(probabilities), torch.zeros_like(live)
        tokens = torch.zeros_like(live)
        for step in range(self.wave.steps):
            # Every live image is answered now; later levels overwrite the answers of those that go on.
            scores[live], exit_step[live], tokens[live] = probabilities, step, entered
            if step == self.wave.steps - 1:
                break
            # Rows are counted among the live images: refine drops the others from the cache.
            rows = (~self.gate(probabilities)).nonzero().squeeze(1)
            if not len(rows):
                break
            live = live[rows]
            z, state = self.wave.refine(state, rows)
            entered += self.wave.tokens_in(step + 1)
            probabilities = self.probabilities(z)
        return Prediction(scores, exit_step, tokens)

"""FLIP (Li et al., CVPR 2023): CLIP's pretraining on pictures of which each shows a random part of its patches.

Shapes: B pairs, S image size, T text tokens, E joint dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.pretraining import CLIPPretraining
from common.reduction import ReducedTower
from patchrank.reducers.random import RandomPerPicture
from patchrank.scores import keep_count


class FLIPPretraining(CLIPPretraining):
    """Train a CLIP by InfoNCE on random parts of the pictures; the trained model sees whole ones.

    Before the first block every picture keeps a share of its patches, drawn anew in each step, so that a step costs
    about that share. A short training on whole pictures follows ("unmasked tuning"): keep 1.

    Args:
        keep: share of the patches that a picture keeps; 0.5 and 0.25 in the paper, 1 for the unmasked tuning.
        settings: see ``CLIPPretraining``.
    """

    def __init__(self, *, keep: float = 0.5, **settings: Any) -> None:
        keep_count(keep, 1)
        super().__init__(**settings)
        self.keep = keep

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S], ids [B,T] -> image and text embeddings [B,E], normalised; masked while training."""
        if not self.training or self.keep == 1:
            return super().forward(images, ids)
        masked = ReducedTower(self.clip.image_tower, {0: RandomPerPicture(self.keep)})
        return F.normalize(masked(images), dim=-1), self.clip.encode_text(ids)

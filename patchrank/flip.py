"""FLIP (Li et al., CVPR 2023): CLIP's pretraining on pictures of which each shows a random part of its patches.

Shapes: B pairs, S image size, T text tokens, E joint dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.optim import OptimizerName
from common.pretraining import CLIPPretraining
from common.reduction import ReducedTower
from patchrank.reducers.random import RandomPerPicture
from patchrank.scores import keep_count


class FLIPPretraining(CLIPPretraining):
    """Train a CLIP by InfoNCE on random parts of the pictures; the trained model sees whole ones.

    Before the first block every picture keeps a share of its patches, drawn anew in each step, so that a step costs
    about that share. A short training on whole pictures follows ("unmasked tuning"): keep 1.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: initial weights: null (random), an open_clip tag, or a local weights file.
        keep: share of the patches that a picture keeps; 0.5 and 0.25 in the paper, 1 for the unmasked tuning.
        quick_gelu: whether a local weights file that does not record its activation uses QuickGELU.
        image_size: image size, if it differs from the architecture's; positional embeddings are interpolated to it.
        preprocess: as CLIPPretraining's.
        learning_rate: peak learning rate of the optimiser.
        weight_decay: weight decay of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        label_smoothing: share of each target spread over all candidates, in [0, 1).
        class_weight: weight of the cross-entropy over the data's class prompts, see CLIPPretraining.
        parts: number of parts in which a batch passes through the towers; see ``common.two_pass``.
        optimizer: adamw or muon, as CLIPPretraining's.
    """

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        keep: float = 0.5,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        preprocess: str | dict[str, Any] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        warmup_steps: int = 2000,
        label_smoothing: float = 0.0,
        class_weight: float = 0.0,
        parts: int = 1,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        keep_count(keep, 1)
        super().__init__(
            architecture,
            weights,
            quick_gelu,
            image_size,
            preprocess,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            parts=parts,
            optimizer=optimizer,
        )
        resolved = self.hparams.preprocess  # as the weights' source tells it
        self.hparams.clear()  # CLIPPretraining's
        self.save_hyperparameters()
        self.hparams.preprocess = resolved
        self.keep = keep

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S], ids [B,T] -> image and text embeddings [B,E], normalised; masked while training."""
        if not self.training or self.keep == 1:
            return super().forward(images, ids)
        masked = ReducedTower(self.clip.image_tower, {0: RandomPerPicture(self.keep)})
        return F.normalize(masked(images), dim=-1), self.clip.encode_text(ids)

"""Training CrossGET as a baseline of Patch Ranking: the same frozen CLIP as teacher, the same images with captions.

Shapes: B images, S image size, T text tokens, E joint dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchrank.crossget import CrossGETTower, alignment_loss, text_cross
from patchrank.frozen_clip import ReducedTowerTraining
from patchrank.reducers.crossget import cross_tokens


class CrossGETTraining(ReducedTowerTraining):
    """Train cross tokens and a copy of the tower to reproduce a frozen CLIP's image embeddings with merged patches.

    The paper's loss is the mean of InfoNCE and of the alignment of the cross tokens of both modalities. Here the cosine
    distance to the full embedding replaces InfoNCE, as in ``AViTTraining``, so that A-ViT, DynamicViT, CrossGET and
    Patch Ranking learn from one signal. Captions serve the alignment alone. The text tower is at rest; the paper trains
    it too.

    The tower learns from the distance and the cross tokens from the alignment, since no token attends to a cross token.
    So AdamW, whose steps have no scale, makes other weights of the two terms equal to these.

    Args:
        keep: over all blocks as many patches are gone as when this share enters the first; released: 0.47, which is
            16 of 196 in each of 12 blocks.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(self, *, keep: float = 0.47, **settings: Any) -> None:
        super().__init__(**settings)
        self.model = CrossGETTower(copy.deepcopy(self.clip.image_tower).requires_grad_(True), keep=keep)
        text = self.clip.text_tower
        self.text_tokens = cross_tokens(text.text_projection.shape[0], len(text.transformer.resblocks))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The cosine distance and the alignment of one batch, each logged. ValueError: it has no texts."""
        if "text" not in batch:
            raise ValueError("CrossGET aligns pictures with texts, and these batches have none; set captions: true")
        with torch.no_grad():
            target = self.clip.image_tower(batch["image"])
        student = self.model.crossed(batch["image"])
        cosine = (1 - F.cosine_similarity(student.z.float(), target.float(), dim=-1)).mean()
        alignment = alignment_loss(student.cross, text_cross(self.clip.text_tower, self.text_tokens, batch["text"]))
        loss = (cosine + alignment) / 2
        self.log_dict({"train_cosine": cosine, "train_alignment": alignment})
        self.log("train_loss", loss, prog_bar=True)
        return loss

"""SLIP (Mu et al., 2021), a baseline of MLIP's tables: CLIP's InfoNCE beside SimCLR on two more views.

Shapes: B pairs, S image size, T text tokens, D width of the image tower, E joint dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.contrastive import info_nce
from common.self_supervision import BatchNormOverRanks, perceptron, simclr, views_of
from common.two_pass import in_parts
from mlip.baseline import BaselinePretraining


class SLIPPretraining(BaselinePretraining):
    """Train a CLIP by InfoNCE of picture and caption, and SimCLR between two further views of the picture.

    SimCLR reads the class token's feature before CLIP's projection, through a perceptron of three layers whose batch
    normalisation counts all ranks. Both terms have the negatives of all ranks, with gradient.

    Args:
        clip_weight: weight of InfoNCE.
        simclr_weight: weight of SimCLR; 1 in SLIP.
        temperature: SimCLR's, fixed.
        hidden_width: of the perceptron.
        projection_width: of its output.
        learning_rate: peak rate of the optimiser.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        settings: see ``BaselinePretraining``.
    """

    def __init__(
        self,
        *,
        clip_weight: float = 1.0,
        simclr_weight: float = 1.0,
        temperature: float = 0.1,
        hidden_width: int = 4096,
        projection_width: int = 256,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.5,
        **settings: Any,
    ) -> None:
        chosen = {"clip_weight": clip_weight, "simclr_weight": simclr_weight, "temperature": temperature}
        for name, value in chosen.items():
            if value <= 0:
                raise ValueError(f"{name} {value} must be positive; SLIP's weights are 1, its temperature is 0.1")
        terms = {"spatial_weight": clip_weight}
        super().__init__(terms, learning_rate=learning_rate, weight_decay=weight_decay, **settings)
        self.weights = {"clip": clip_weight, "simclr": simclr_weight}
        self.temperature = temperature
        width = self.clip.architecture["vision_cfg"]["width"]
        self.projector = perceptron(width, hidden_width, hidden_width, projection_width, norm=BatchNormOverRanks)

    def _embed(self, images: Tensor, ids: Tensor, *views: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of images [B,3,S,S] and ids [B,T], both [B,E], and the features [B,D] of each view."""
        features = [self.clip.penultimate(view) for view in views]
        return self.clip.image_tower.encode_image(images, False), self.clip.text_tower(ids), *features

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The two terms of one batch by name, without their weights. ValueError: the batch has not two views."""
        views = views_of(batch, 2, "SLIP")
        image, text, *features = in_parts(self._embed, self.parts, batch["image"], batch["text"], *views)
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        shared = {"same": batch["caption_id"], "label_smoothing": self.label_smoothing}
        projections = [self.projector(feature) for feature in features]
        return {
            "clip": info_nce(image, text, self.clip.logit_scale.exp(), **shared),
            "simclr": simclr(*projections, self.temperature),
        }

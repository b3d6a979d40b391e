"""Training A-ViT as a baseline of Patch Ranking: the same frozen CLIP as target, the same images, no labels.

Shapes: B images, S image size, E joint dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from patchrank.avit import AViTTower, Halting, distribution_loss, ponder_loss
from patchrank.frozen_clip import ReducedTowerTraining


class AViTTraining(ReducedTowerTraining):
    """Train an A-ViT to reproduce a frozen CLIP's image embeddings with fewer tokens in deep blocks.

    The paper trains with a classification loss. Here the cosine distance to the full embedding replaces it. Feature
    preservation ranks tokens by the same distance, so A-ViT and predictor learn from the same signal.

    Args:
        depth: the mean of the target for the halting distribution, in blocks (``distribution_target``).
        distribution_weight: weight of the divergence from that distribution.
        ponder_weight: weight of the ponder loss.
        scale: scale of the halting score; released: 10.
        shift: shift of the halting score; released: -30 for the tiny model, -75 for the small one.
        learning_rate: peak rate of AdamW.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(
        self,
        *,
        depth: float = 8.0,
        distribution_weight: float = 0.001,
        ponder_weight: float = 5e-4,
        scale: float = 10.0,
        shift: float = -30.0,
        learning_rate: float = 1e-4,
        **settings: Any,
    ) -> None:
        for name, value in (("distribution_weight", distribution_weight), ("ponder_weight", ponder_weight)):
            if value < 0:
                raise ValueError(f"{name} {value} is negative; 0 leaves the term out")
        super().__init__(learning_rate=learning_rate, **settings)
        layers = len(self.clip.image_tower.transformer.resblocks)
        if not 1 <= depth <= layers:
            raise ValueError(f"depth {depth} is not between 1 and this tower's {layers} blocks")
        self.depth = depth
        self.model = AViTTower(self.clip.image_tower, scale, shift).requires_grad_(True)
        self.term_weights = {"distribution": distribution_weight, "ponder": ponder_weight}
        self.validation_depth = MeanMetric()

    def _distances(self, images: Tensor) -> tuple[Tensor, Halting]:
        """1 - cos to the full embedding [B], and the halting."""
        with torch.no_grad():
            target = self.clip.image_tower(images)
        halting = self.model.run(images)
        return 1 - F.cosine_similarity(halting.z.float(), target.float(), dim=-1), halting

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The cosine distance and both halting losses of one batch, each logged apart."""
        distances, halting = self._distances(batch["image"])
        terms = {"distribution": distribution_loss(halting, self.depth), "ponder": ponder_loss(halting)}
        loss = distances.mean() + sum(self.term_weights[name] * value for name, value in terms.items())
        self.log_dict({"train_cosine": distances.mean(), "train_depth": halting.depth.mean()})
        self.log_dict({f"train_{name}": value for name, value in terms.items()})
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Mean cosine distance and mean depth."""
        distances, halting = self._distances(batch["image"])
        for name, metric, values in (
            ("val_cosine", self.validation_cosine, distances),
            ("val_depth", self.validation_depth, halting.depth),
        ):
            metric.update(values)
            self.log(name, metric, prog_bar=True)

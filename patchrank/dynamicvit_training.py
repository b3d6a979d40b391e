"""Training DynamicViT as a baseline of Patch Ranking: the same frozen CLIP as teacher, the same images, no labels.

Shapes: B images, S image size, K patch tokens, E joint dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import optim
from patchrank.dynamicvit import DynamicViTTower, ratio_loss, token_loss
from patchrank.frozen_clip import ReducedTowerTraining


class DynamicViTTraining(ReducedTowerTraining):
    """Train prediction modules and a copy of the tower to reproduce a frozen CLIP's image embeddings and tokens.

    The paper's loss is that of its labels, plus 0.5 times the KL divergence of the classes' probabilities from an
    unpruned teacher's, plus 0.5 times the mean square error of the kept tokens, plus 2 times the ratio loss. Here the
    cosine distance to the full embedding replaces the first two, as in ``AViTTraining``, so that A-ViT, DynamicViT and
    Patch Ranking learn from one signal.

    Args:
        keep: the base rate; the three stages keep its first, second and third power of the patches.
        token_weight: weight of the error of the kept tokens.
        ratio_weight: weight of the ratio loss.
        predictor_factor: how many times the learning rate, which is the tower's, the prediction modules have; 100 as
            released.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(
        self,
        *,
        keep: float = 0.7,
        token_weight: float = 0.5,
        ratio_weight: float = 2.0,
        predictor_factor: float = 100.0,
        **settings: Any,
    ) -> None:
        for name, value in (("token_weight", token_weight), ("ratio_weight", ratio_weight)):
            if value < 0:
                raise ValueError(f"{name} {value} is negative; 0 leaves the term out")
        if predictor_factor <= 0:
            raise ValueError(f"predictor_factor {predictor_factor} is not positive; 100 is the released one")
        super().__init__(**settings)
        tower = copy.deepcopy(self.clip.image_tower).requires_grad_(True)
        self.model = DynamicViTTower(tower, keep=keep)
        self.term_weights = {"tokens": token_weight, "ratio": ratio_weight}
        self.predictor_factor = predictor_factor

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The cosine distance of the masked pass, the error of its kept tokens and its ratio loss, each logged."""
        teacher = self.clip.image_tower
        with torch.no_grad():
            tokens = teacher.run_blocks(teacher.embed(batch["image"]))
            target, target_patches = teacher.pool(tokens), teacher.ln_post(tokens)[:, 1:]
        student = self.model.masked(batch["image"])
        cosine = (1 - F.cosine_similarity(student.z.float(), target.float(), dim=-1)).mean()
        terms = {
            "tokens": token_loss(student.patches, target_patches, student.kept[-1]),
            "ratio": ratio_loss(student.kept, self.model.keep),
        }
        loss = cosine + sum(self.term_weights[name] * value for name, value in terms.items())
        self.log_dict({"train_cosine": cosine, "train_kept": student.kept[-1].mean()})
        self.log_dict({f"train_{name}": value for name, value in terms.items()})
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW with a higher rate for the prediction modules, per-step warm-up and cosine over the whole run."""
        predictors = self.model.predictors.parameters()
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay, predictors, self.predictor_factor)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches)

"""A-CLIP (Yang et al., ICCV 2023): CLIP's pretraining on the patches to which a slow copy of the tower attends.

Shapes: B pairs, S image size, T text tokens, K patch tokens, R kept, L blocks, H heads, g patches a side, D width,
E joint dim, P width of a projection.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP
from common.contrastive import info_nce_of_views
from common.optim import OptimizerName
from common.pretraining import ContrastivePretraining
from common.reduction import ReducedTower, ReductionContext
from common.self_supervision import BatchNormOverRanks, byol, perceptron, simclr, views_of
from common.tower import ImageTower


def attentive_places(attention: Tensor, keep: float) -> Tensor:
    """The patches that A-CLIP's mask leaves: those of the most attended cells of two by two patches.

    attention: [B,g²], the class token's to every patch.  keep: share of the cells.
    Returns long [B,R] in ascending order, with R = 4 (int(keep·g²/4) + 1), one cell more than the share, as released;
    at most all. 14 patches a side at keep 0.5: 25 of 49 cells, 100 of 196 patches.
    ValueError: an odd g has no such cells.
    """
    grid = math.isqrt(attention.shape[1])
    if grid % 2:
        raise ValueError(f"a grid of {grid} patches a side has no cells of two by two; take an even number")
    cells = F.avg_pool2d(attention.unflatten(1, (1, grid, grid)), 2).flatten(1)
    count = min(int(cells.shape[1] * keep) + 1, cells.shape[1])
    chosen = cells.argsort(dim=1, descending=True, stable=True)[:, :count]
    corner = 2 * grid * (chosen // (grid // 2)) + 2 * (chosen % (grid // 2))
    offsets = torch.tensor([0, 1, grid, grid + 1], device=attention.device)
    return (corner[..., None] + offsets).flatten(1).sort(dim=1).values


def momentum_at(step: int, steps: int, start: float) -> float:
    """The share that the slow copy keeps of itself in a step: from ``start`` to 1 by a half cosine."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move the parameters of ``slow`` to momentum · slow + (1 - momentum) · fast."""
    for mine, other in zip(slow.parameters(), fast.parameters(), strict=True):
        mine.lerp_(other.to(mine.dtype), 1 - momentum)


def _select(x: Tensor, context: ReductionContext, kept: Tensor) -> tuple[Tensor, ReductionContext]:
    return context.select(x, kept)


class ACLIPPretraining(ContrastivePretraining):
    """Train a CLIP on two views of each picture, of which it sees the patches that a slow copy attends to.

    The copy's parameters follow the tower's as a moving average. Its map of a view is the class token's attention, the
    mean over all blocks and heads; ``attentive_places`` leaves the most attended cells. The loss is InfoNCE of either
    view with the caption, ½ each, SimCLR between the views, and BYOL: a prediction from each masked view of the copy's
    projection of the other, whole view.

    Released, the copy sees one larger crop that contains both views, and its map is resampled to each: here it sees
    the views themselves, which needs no boxes and one more forward pass of the copy. Two slips are not repeated: SimCLR
    compares a view with itself there, and nothing is masked unless an option is set. The copy of the text tower, which
    enters no loss, is left out.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: initial weights: null (random), an open_clip tag, or a local weights file.
        preprocess, quick_gelu: as CLIPPretraining's.
        keep: share of the cells that a view keeps.
        momentum: of the slow copy in the first step; it grows to 1.
        clip_weight: weight of InfoNCE.
        simclr_weight: weight of SimCLR.
        byol_weight: weight of BYOL.
        temperature: SimCLR's.
        hidden_width: of all perceptrons.
        projection_width: P.
        learning_rate: peak rate of the optimiser.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        label_smoothing: share of each of InfoNCE's targets spread over all candidates, in [0, 1).
        optimizer: adamw or muon, as CLIPPretraining's.
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        preprocess: str | dict[str, Any] | None = None,
        quick_gelu: bool | None = None,
        keep: float = 0.5,
        momentum: float = 0.996,
        clip_weight: float = 1.0,
        simclr_weight: float = 1.0,
        byol_weight: float = 2.0,
        temperature: float = 0.1,
        hidden_width: int = 4096,
        projection_width: int = 256,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.5,
        warmup_steps: int = 2500,
        label_smoothing: float = 0.0,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, label_smoothing, optimizer=optimizer)
        if not 0 < keep <= 1:
            raise ValueError(f"keep {keep} is not in (0, 1]; it is the share of a view's cells that stay")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} is not in [0, 1); 0.996 is the released one")
        for name, value, released in (("clip_weight", clip_weight, 1), ("temperature", temperature, 0.1)):
            if value <= 0:
                raise ValueError(f"{name} {value} is not positive; the released one is {released}")
        for name, value in (("simclr_weight", simclr_weight), ("byol_weight", byol_weight)):
            if value < 0:
                raise ValueError(f"{name} {value} is negative; 0 takes the term out of the loss")
        self.save_hyperparameters()
        self.clip = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu, preprocess=preprocess)
        self.hparams.preprocess = self.clip.architecture.get("preprocess_cfg")
        tower = self.clip.image_tower
        attentive_places(torch.zeros(1, tower.grid**2), keep)  # ValueError: an odd grid
        tower.conv1.requires_grad_(False)  # the patch embedding stays at its start, as released
        sizes = {"norm": BatchNormOverRanks}
        self.simclr_head = perceptron(tower.width, hidden_width, hidden_width, projection_width, **sizes)
        self.byol_head = perceptron(tower.width, hidden_width, projection_width, **sizes)
        self.byol_prediction = perceptron(projection_width, hidden_width, projection_width, **sizes)
        self.slow_tower: ImageTower = copy.deepcopy(tower).requires_grad_(False)
        self.slow_head = copy.deepcopy(self.byol_head).requires_grad_(False)
        self.keep, self.momentum, self.temperature = keep, momentum, temperature
        self.weights = {"clip": clip_weight, "simclr": simclr_weight, "byol": byol_weight}

    @torch.no_grad()
    def observe(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """view [B,3,S,S] -> the slow copy's attention to the patches [B,K], and its projection [B,P] of the view."""
        tower = self.slow_tower
        blocks = tower.observed_blocks(tower.embed(view), range(len(tower.transformer.resblocks)))
        attention = torch.stack([block.class_attention.mean(1) for block in blocks]).mean(0)[:, 1:]
        return attention, self.slow_head(tower.ln_post(blocks[-1].class_token))

    def features(self, view: Tensor, kept: Tensor) -> Tensor:
        """The class token [B,D], before projection, of view [B,3,S,S] that shows the patches ``kept`` (long [B,R])."""
        tower = self.clip.image_tower
        x, _ = ReducedTower(tower, {0: partial(_select, kept=kept)}).run(view)
        return tower.class_feature(x)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The three terms of one batch by name, without their weights. ValueError: the batch has not two views."""
        views = views_of(batch, 2, "A-CLIP", "aclip")
        observed = [self.observe(view) for view in views]
        features = [
            self.features(view, attentive_places(attention, self.keep))
            for view, (attention, _) in zip(views, observed, strict=True)
        ]
        text, scale = self.clip.encode_text(batch["text"]), self.clip.logit_scale.exp()
        shared = {"same": batch["caption_id"], "label_smoothing": self.label_smoothing}
        images = [F.normalize(feature @ self.clip.image_tower.proj, dim=-1) for feature in features]
        predictions = [self.byol_prediction(self.byol_head(feature)) for feature in features]
        targets = [projection for _, projection in reversed(observed)]
        return {
            "clip": info_nce_of_views(images, [text], scale, **shared),
            "simclr": simclr(*(self.simclr_head(feature) for feature in features), self.temperature),
            "byol": sum(byol(*pair) for pair in zip(predictions, targets, strict=True)) / 2,
        }

    def loss(self, batch: dict) -> Tensor:
        """The weighted sum of the terms of one batch, each logged."""
        terms = self.losses(batch)
        self.log_dict({f"train_{name}": value for name, value in terms.items()})
        return sum(self.weights[name] * value for name, value in terms.items())

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and let the slow copy follow."""
        super().optimizer_step(*arguments, **options)
        momentum = momentum_at(self.global_step, self.trainer.estimated_stepping_batches, self.momentum)
        follow(self.slow_tower, self.clip.image_tower, momentum)
        follow(self.slow_head, self.byol_head, momentum)

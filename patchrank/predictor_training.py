"""Phase II of Patch Ranking: the predictor learns the golden rankings of a frozen CLIP.

Shapes: B images, S image size, N patch tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from common.clip import CLIP
from common.zeroshot import embed_prompts
from patchrank.frozen_clip import FrozenCLIPTraining, class_prompts
from patchrank.golden_cache import Rankings, ranked
from patchrank.losses import Loss, kendall_tau, pruned_overlap, ranking_loss
from patchrank.predictor import RankPredictor
from patchrank.scores import Score, keep_count
from patchrank.tower import PatchRankTower


class RankPredictorTraining(FrozenCLIPTraining):
    """Train a predictor to rank patch tokens as their golden ranking does; the CLIP is frozen.

    The golden rankings of the training images are computed before the first step and kept on disk, so the data must
    give its training images as in evaluation (augment: false). The paper states neither loss nor schedule: the loss
    is the released code's, and AdamW with a cosine replaces its Adam.

    Args:
        prune_layer: the block before which tokens are scored and pruned.
        keep: share of patch tokens that will be kept, below 1; the loss "keep_set" and the overlap depend on it.
        loss: keep_set (divergence from the golden keep set), margin (hinge over all ordered pairs) or listwise
            (likelihood of the golden order).
        score: what the golden ranking preserves: feature, or the data's classes by label or confidence.
        block: side of the removed windows, in patches.
        stride: step between windows; equal to block they do not overlap.
        rounds: greedy rounds of the golden ranking.
        removed_per_round: tokens that each round but the last removes; required for more than one round.
        learning_rate: peak rate of AdamW.
        weight_decay: of matrices.
        final_learning_rate: the rate with which the cosine ends, at most ``learning_rate``.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(
        self,
        *,
        prune_layer: int = 3,
        keep: float = 0.6,
        loss: Loss = "keep_set",
        score: Score = "feature",
        block: int = 2,
        stride: int = 1,
        rounds: int = 1,
        removed_per_round: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        final_learning_rate: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **settings)
        if not 0 <= final_learning_rate <= learning_rate:
            raise ValueError(f"final_learning_rate {final_learning_rate} must lie from 0 to the peak, {learning_rate}")
        tower = self.clip.image_tower
        self.predictor = RankPredictor.for_tower(tower)
        self.pruned = tower.grid**2 - keep_count(keep, tower.grid**2)
        if not self.pruned:
            raise ValueError(f"keep {keep} prunes nothing of {tower.grid**2} patch tokens; train for a rate below 1")
        if not 0 <= prune_layer < len(tower.transformer.resblocks):
            raise ValueError(f"prune_layer {prune_layer} is none of the {len(tower.transformer.resblocks)} blocks")
        self.prune_layer, self.loss, self.score = prune_layer, loss, score
        self.removal = {"block": block, "stride": stride, "rounds": rounds, "removed_per_round": removed_per_round}
        self.final = final_learning_rate / learning_rate
        self.overlap, self.tau = MeanMetric(), MeanMetric()
        self._golden: dict[str, Rankings] = {}

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> scores [B,N], high = keep."""
        tower = self.clip.image_tower
        with torch.no_grad():
            x = tower.run_blocks(tower.embed(images), stop=self.prune_layer)
        return self.predictor(x)

    def setup(self, stage: str) -> None:
        """Forget the rankings of an earlier run, which may be of other images."""
        super().setup(stage)
        self._golden = {}

    def on_fit_start(self) -> None:
        """Rank the training images. ValueError: random views of them, or several processes."""
        data = self.trainer.datamodule
        if getattr(data, "augment", True):
            raise ValueError("golden rankings are of one view of a picture; set the data's augment: false")
        if self.trainer.world_size > 1:
            raise ValueError(f"{self.trainer.world_size} processes: a predictor is trained by one; set devices: 1")
        self._golden["train"] = self._rank(data.dataloader("train", train=False))

    def _rank(self, batches: Iterable[dict[str, Any]]) -> Rankings:
        settings = {"prune_layer": self.prune_layer, **self.removal}
        if self.score != "feature":
            classes = embed_prompts(self.clip, class_prompts(self.trainer))
            settings |= {"class_embeddings": classes, "logit_scale": self.clip.logit_scale.exp()}
        return ranked(self.clip.image_tower, batches, self.score, **settings)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of the predicted scores against the golden orders."""
        order = self._golden["train"].of(batch["key"]).to(self.device)
        loss = ranking_loss(self.loss, self(batch["image"]), order, self.pruned)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Rank the images that validation will take, once."""
        if "val" not in self._golden:
            self._golden["val"] = self._rank(_limited(self.trainer.val_dataloaders, self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Rank the images that the test will take."""
        self._golden["test"] = self._rank(_limited(self.trainer.test_dataloaders, self.trainer.num_test_batches))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Overlap of the pruned sets, and Kendall's τ over all tokens."""
        self._agreement(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """The same on the test split, whose golden rankings serve for this measure alone."""
        self._agreement(batch, "test")

    def _agreement(self, batch: dict, split: str) -> None:
        order = self._golden[split].of(batch["key"]).to(self.device)
        scores = self(batch["image"])
        self.overlap.update(pruned_overlap(scores, order, self.pruned))
        self.tau.update(kendall_tau(scores, order))
        self.log_dict({f"{split}_overlap": self.overlap, f"{split}_tau": self.tau}, prog_bar=True)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the predicted scores [B,N] of its images."""
        return {"key": batch["key"], "scores": self(batch["image"])}

    def deployable(self) -> tuple[PatchRankTower, CLIP]:
        """The image tower that prunes by this predictor, and the CLIP whose text tower goes with it."""
        tower = PatchRankTower(self.clip.image_tower, self.predictor, self.hparams.keep, self.prune_layer)
        return tower, self.clip


def _limited(batches: Iterable[dict[str, Any]], limits: list[int | float]) -> Iterable[dict[str, Any]]:
    """The batches of one loader that the trainer will take."""
    limit = limits[0]
    return islice(batches, None if limit == float("inf") else int(limit))

"""Contrastive pretraining: what all its losses share, and plain CLIP, the baseline of every table.

Shapes: B pairs, S image size, T text tokens, E joint dim, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.contrastive import clamp_logit_scale, info_nce
from common.retrieval import PairRecall
from common.zeroshot import embed_prompts


class ContrastivePretraining(LightningModule):
    """Pretraining of a CLIP by a loss on batches of pairs: optimiser, bounds of the scale, zero-shot validation.

    A subclass builds ``clip`` and says what ``loss`` is. The arguments are those of its command line.
    """

    clip: CLIP

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup_steps: int, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1)")
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.label_smoothing = label_smoothing
        self.validation_top1, self.validation_recall = MeanMetric(), PairRecall()
        self._classes: Tensor | None = None

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S], ids [B,T] -> image and text embeddings [B,E], normalised."""
        return self.clip.encode_image(images), self.clip.encode_text(ids)

    @abstractmethod
    def loss(self, batch: dict) -> Tensor:
        """The scalar that one batch of pairs is trained by."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch, logged with the scale."""
        return self.log_step(self.loss(batch))

    def log_step(self, loss: Tensor) -> Tensor:
        """The loss of a step, which is logged with the scale."""
        self.log("train_loss", loss, prog_bar=True)
        self.log("logit_scale", self.clip.logit_scale.exp())
        return loss

    def on_train_batch_end(self, outputs: Tensor, batch: dict, batch_idx: int) -> None:
        """Keep the scale within CLIP's bounds."""
        clamp_logit_scale(self.clip.logit_scale)

    def on_validation_epoch_start(self) -> None:
        """Embed the data's class prompts, where it has classes."""
        prompts = getattr(self.trainer.datamodule, "class_prompts", None)
        self._classes = None if prompts is None else embed_prompts(self.clip, prompts)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Zero-shot accuracy by class prompt where there are classes, else InfoNCE; recall where there are captions.

        InfoNCE is among the batch's own pairs, since the processes may have different numbers of batches.
        """
        image = self.clip.encode_image(batch["image"])
        if "text" in batch:
            text = self.clip.encode_text(batch["text"])
            self.validation_recall.update(image, text, batch["caption_id"])
        if self._classes is None:
            loss = info_nce(image, text, self.clip.logit_scale.exp(), same=batch["caption_id"], gather=False)
            self.log("val_loss", loss, sync_dist=True, batch_size=len(image))
            return
        guess = (image @ self._classes.T).argmax(1)
        self.validation_top1.update((guess == batch["label"]).float())
        self.log("val_top1", self.validation_top1, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log R@1 both ways among all pairs of the split."""
        if self.validation_recall.update_called:
            for way, found in self.validation_recall.compute().items():
                self.log(f"val_{way}_r1", found["R@1"], sync_dist=True)
            self.validation_recall.reset()

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """The same on the test split."""
        self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and its normalised image embeddings [B,E]."""
        return {"key": batch["key"], "embedding": self.clip.encode_image(batch["image"])}

    def deployable(self) -> tuple[CLIP, None]:
        """The trained model, and whose texts it is read against beside its own: nobody's."""
        return self.clip, None

    def configure_optimizers(self) -> dict:
        """AdamW, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches)


class CLIPPretraining(ContrastivePretraining):
    """Train a CLIP from scratch, or further, with InfoNCE over the batches of all ranks.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: where to start: null (random), an open_clip tag, or a local weights file.
        quick_gelu: the activation of a local weights file that does not record it.
        image_size: picture size, where it is not the architecture's; the weights' positions are interpolated to it.
        learning_rate: peak rate of AdamW.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        label_smoothing: share of each target spread over all candidates, in [0, 1).
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        warmup_steps: int = 2000,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, label_smoothing)
        self.save_hyperparameters()
        self.clip = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu, image_size=image_size)

    def loss(self, batch: dict) -> Tensor:
        """InfoNCE of one batch; pairs whose captions are equal are positives of each other."""
        image, text = self(batch["image"], batch["text"])
        scale = self.clip.logit_scale.exp()
        return info_nce(image, text, scale, same=batch["caption_id"], label_smoothing=self.label_smoothing)

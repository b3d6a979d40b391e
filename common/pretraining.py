"""Contrastive pretraining: the base class of all its losses, and plain CLIP, the baseline of every table.

Shapes: B pairs, S image size, T text tokens, E joint dim, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.contrastive import clamp_logit_scale, info_nce, scaled_cosines
from common.pair_recall import PairRecall
from common.preprocess import prepare_data
from common.two_pass import in_parts
from common.zeroshot import embed_prompts, similarity, training_prompts


class Deployable(Protocol):
    """A training that makes a model which can be saved and used without the training."""

    def deployable(self) -> tuple[nn.Module, CLIP | None]:
        """The trained model, and the CLIP whose text tower it needs; None: it needs no other text tower."""
        ...


class ContrastivePretraining(LightningModule):
    """Trains a CLIP on batches of image-text pairs: optimiser, bounds of the logit scale, zero-shot validation.

    A subclass builds ``clip`` and defines ``loss``. The constructor's arguments are settings of the recipe.
    """

    clip: CLIP

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        label_smoothing: float = 0.0,
        parts: int = 1,
        optimizer: optim.OptimizerName = "adamw",
    ) -> None:
        super().__init__()
        optim.check_settings(learning_rate, weight_decay, warmup_steps)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1)")
        if parts < 1:
            raise ValueError(f"parts {parts} is not positive; 1 passes the batch through the towers at once")
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.label_smoothing, self.parts, self.optimizer_name = label_smoothing, parts, optimizer
        self.validation_top1, self.validation_recall = MeanMetric(), PairRecall()
        self._classes: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Show pictures as the CLIP was trained on them so far."""
        prepare_data(self.trainer, self.clip.preprocess)

    def on_fit_start(self) -> None:
        """ValueError: accumulated gradients, which would not have the negatives of the larger batch."""
        parts = self.trainer.accumulate_grad_batches
        if parts > 1:
            mend = f"make the batch {parts} times as large and set the model's parts to {parts}"
            if "parts" not in self.hparams:
                mend = f"{type(self).__name__} passes the batch at once, so take a smaller one or more devices"
            raise ValueError(
                f"accumulate_grad_batches {parts} would not make a batch {parts} times as large: each part would have "
                f"its own negatives alone; {mend}"
            )

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S], ids [B,T] -> image and text embeddings [B,E], normalised."""
        return self.clip.encode_image(images), self.clip.encode_text(ids)

    @abstractmethod
    def loss(self, batch: dict) -> Tensor:
        """The scalar training loss of one batch of pairs."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch, logged with the logit scale."""
        self._need_captions(batch)
        return self.log_step(self.loss(batch))

    def _need_captions(self, batch: dict) -> None:
        if "text" not in batch:
            raise ValueError("the loss compares pictures with captions, and has none; set the data's captions: true")

    def log_step(self, loss: Tensor) -> Tensor:
        """Log a step's loss and the logit scale; returns the loss."""
        self.log("train_loss", loss, prog_bar=True)
        self.log("logit_scale", self.clip.logit_scale.exp())
        return loss

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and keep the logit scale within CLIP's bounds, before any checkpoint of the step is written."""
        super().optimizer_step(*arguments, **options)
        clamp_logit_scale(self.clip.logit_scale)

    def on_validation_epoch_start(self) -> None:
        """Embed the class prompts, where the data module has ``class_prompts``."""
        prompts = getattr(self.trainer.datamodule, "class_prompts", None)
        self._classes = None if prompts is None else embed_prompts(self.clip, prompts)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log zero-shot accuracy for data with classes, otherwise InfoNCE; collect recall for data with captions.

        InfoNCE uses only this process's pairs, since processes may have different numbers of batches.
        """
        image = self.clip.encode_image(batch["image"])
        if "text" in batch:
            text = self.clip.encode_text(batch["text"])
            self.validation_recall.update(image, text, batch["caption_id"])
        if self._classes is None:
            self._need_captions(batch)
            loss = info_nce(image, text, self.clip.logit_scale.exp(), same=batch["caption_id"], gather=False)
            self.log("val_loss", loss, sync_dist=True, batch_size=len(image))
            return
        guess = similarity(image, self._classes).argmax(1)
        self.validation_top1.update((guess == batch["label"]).float())
        self.log("val_top1", self.validation_top1, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log R@1 in both directions among all pairs of the split."""
        if self.validation_recall.update_called:
            for direction, recalls in self.validation_recall.compute().items():
                self.log(f"val_{direction}_r1", recalls["R@1"], sync_dist=True)
            self.validation_recall.reset()

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """As validation, on the test split."""
        self.validation_step(batch, batch_idx)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and its normalised image embeddings [B,E]."""
        return {"key": batch["key"], "embedding": self.clip.encode_image(batch["image"])}

    def deployable(self) -> tuple[CLIP, None]:
        """The trained CLIP, which has its own text tower."""
        return self.clip, None

    def configure_optimizers(self) -> dict:
        """The optimiser with per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay, optimizer=self.optimizer_name)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches)


class CLIPPretraining(ContrastivePretraining):
    """Train a CLIP from scratch, or further, with InfoNCE over the batches of all ranks.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: initial weights: null (random), an open_clip tag, or a local weights file.
        quick_gelu: whether a local weights file that does not record its activation uses QuickGELU.
        image_size: image size, if it differs from the architecture's; positional embeddings are interpolated to it.
        preprocess: how pictures were prepared for a local weights file of which it is not known: clip, a tag of the
            architecture that was trained alike, or open_clip's preprocess_cfg.
        learning_rate: peak learning rate of the optimiser.
        weight_decay: weight decay of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        label_smoothing: share of each target spread over all candidates, in [0, 1).
        class_weight: weight of the cross-entropy of each image over the data's class prompts, for training with labels.
            It is meant for captions that tell much besides the class. 0 leaves it out.
        parts: number of parts in which a batch passes through the towers. More than 1 is for batches larger than
            memory: the same loss and gradient, for one more forward pass; see ``common.two_pass``.
        optimizer: adamw, or muon for the matrices of the towers' blocks and AdamW for all else (``common.muon``).
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a complete checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        preprocess: str | dict[str, Any] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        warmup_steps: int = 2000,
        label_smoothing: float = 0.0,
        class_weight: float = 0.0,
        parts: int = 1,
        optimizer: optim.OptimizerName = "adamw",
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, label_smoothing, parts, optimizer)
        if class_weight < 0:
            raise ValueError(f"class_weight {class_weight} is negative; 0 leaves the term out")
        self.save_hyperparameters()
        self.class_weight = class_weight
        self.clip = CLIP.from_open_clip(
            architecture, weights, quick_gelu=quick_gelu, image_size=image_size, preprocess=preprocess
        )
        self.hparams.preprocess = self.clip.architecture.get("preprocess_cfg")

    def on_fit_start(self) -> None:
        """Ask for classes where the loss needs them. ValueError: the data has none; accumulated gradients."""
        super().on_fit_start()
        if self.class_weight and training_prompts(self.trainer.datamodule) is None:
            raise ValueError(
                f"class_weight {self.class_weight} needs training data with classes, and these have none; set it to 0"
            )

    def loss(self, batch: dict) -> Tensor:
        """InfoNCE of one batch, in which pairs with equal captions are positives of each other, and the class term."""
        image, text = in_parts(self, self.parts, batch["image"], batch["text"])
        scale = self.clip.logit_scale.exp()
        contrast = info_nce(image, text, scale, same=batch["caption_id"], label_smoothing=self.label_smoothing)
        if not self.class_weight:
            return contrast
        ids = self.clip.tokenizer(training_prompts(self.trainer.datamodule), longest=True).to(image.device)
        classes = self.clip.encode_text(ids)
        classification = F.cross_entropy(scaled_cosines(image, classes, scale), batch["label"])
        self.log_dict({"train_contrast": contrast, "train_class": classification})
        return contrast + self.class_weight * classification

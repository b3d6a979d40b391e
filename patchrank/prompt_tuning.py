"""Phase III of Patch Ranking: prompts win back what pruning costs, beside a frozen CLIP.

Shapes: B images, S image size, C classes, T text tokens, L prompted layers, P prompts, D text width, E joint dim.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.contrastive import scaled_cosines
from common.zeroshot import fill, similarity
from patchrank.frozen_clip import FrozenCLIPTraining, class_prompts
from patchrank.predictor import load_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Kind, Prompts, words_by_layer
from patchrank.tower import PatchRankTower


class PromptTuning(FrozenCLIPTraining):
    """Tune prompts for few-shot classification while the predictor prunes; CLIP and predictor are frozen.

    The loss is the cross-entropy of CLIP's zero-shot scores; the current text prompts give the class embeddings. The
    paper states neither the number and depth of prompts nor a schedule; the defaults are those of MaPLe, which the
    released code contains. The predictor is not trained again: it reads the tokens as the prompts change them.

    Args:
        predictor: a checkpoint of RankPredictorTraining or a PatchRankTower's file; null is for keep 1 alone.
        keep: share of the patch tokens that stay; 1 tunes without pruning.
        prune_layer: the block before which tokens are pruned.
        kind: coupled (text prompts, and image prompts mapped from them), independent (both), text or visual.
        prompts: number of prompts in each prompted encoder.
        depth: number of layers that have prompts.
        words: text that the text prompts start from, one prompt per word; null: at random.
        template: class prompt with {} for the name; null: the data's. Text prompts stand before it.
        learning_rate: peak rate of SGD.
        momentum: of SGD.
        weight_decay: of prompts and couplings, except biases.
        warmup_steps: steps of linear warm-up before the cosine.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(
        self,
        *,
        predictor: str | None = None,
        keep: float = 0.6,
        prune_layer: int = 3,
        kind: Kind = "coupled",
        prompts: int = 2,
        depth: int = 9,
        words: str | None = None,
        template: str | None = None,
        learning_rate: float = 0.0035,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 50,
        **settings: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps, **settings)
        clip = self.clip
        ranker = None if predictor is None else load_predictor(predictor, clip.image_tower, prune_layer)
        widths = clip.text_tower.ln_final.normalized_shape[0], clip.image_tower.ln_post.normalized_shape[0]
        start = None if words is None else _words(clip, words, kind, depth)
        learned = Prompts(kind, prompts, depth, *widths, start=start)
        self.model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, ranker, keep, prune_layer, learned))
        self.model.requires_grad_(False)
        learned.requires_grad_(True)
        self.template = template
        self.momentum = momentum
        self.top1 = MeanMetric()
        self._ids: Tensor | None = None
        self._classes: Tensor | None = None

    @property
    def prompts(self) -> Prompts:
        """The trained prompts; ``prompts.save(path)`` writes what inference needs."""
        return self.model.tower.prompts

    def setup(self, stage: str) -> None:
        """Tokenise the class prompts, and forget the class embeddings of an earlier run. ValueError: no classes."""
        super().setup(stage)
        texts, template = class_prompts(self.trainer), self.template
        if template is not None:
            texts = [fill(template, name) for name in self.trainer.datamodule.class_names]
        self._ids, self._classes = self.model.tokenizer(texts, longest=True), None

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> unit embeddings [B,E] of the pruned, prompted tower."""
        return self.model.encode_image(images)

    def embed_classes(self) -> Tensor:
        """Unit class embeddings [C,E] by the current prompts."""
        return self.model.encode_text(self._ids.to(self.device))

    def on_fit_start(self) -> None:
        """Embed the classes once if no text prompts change them."""
        with torch.no_grad():
            self._classes = None if self.prompts.texts else self.embed_classes()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross-entropy over the classes."""
        classes = self.embed_classes() if self.prompts.texts else self._classes
        logits = scaled_cosines(self(batch["image"]), classes, self.model.logit_scale.exp())
        loss = F.cross_entropy(logits, batch["label"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Embed the classes by the current prompts."""
        if self.prompts.texts or self._classes is None:
            self._classes = self.embed_classes()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Zero-shot accuracy."""
        guess = similarity(self(batch["image"]), self._classes).argmax(1)
        self.top1.update((guess == batch["label"]).float())
        self.log("val_top1", self.top1, prog_bar=True)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the normalised embeddings [B,E] of its images."""
        return {"key": batch["key"], "embedding": self(batch["image"])}

    def deployable(self) -> tuple[PromptedCLIP, None]:
        """The tuned model; it has its own text tower, so no other CLIP goes with it."""
        return self.model, None

    def configure_optimizers(self) -> dict:
        """SGD with momentum, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        optimizer = SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        return optim.scheduled(optimizer, self.warmup_steps, self.trainer.estimated_stepping_batches)


def _words(clip: CLIP, words: str, kind: Kind, depth: int) -> Tensor | None:
    """Prompts [L,P,D] that equal the words in every layer; a warning and None if there are no text prompts."""
    if kind == "visual":
        rank_zero_warn(f"words {words!r} are ignored: kind visual has no text prompts")
        return None
    return words_by_layer(clip.text_tower, clip.tokenizer([words], longest=True), depth)

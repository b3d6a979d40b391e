"""The two trainings of Patch Ranking: the predictor (section 3.2) and the prompts (section 3.3), beside a frozen CLIP.

Shapes: B images, S image size, N patch tokens, C classes, T text tokens, E joint dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.contrastive import scaled_cosines
from common.zeroshot import embed_prompts, fill
from patchrank.frozen_clip import TrainedPart
from patchrank.golden_cache import Rankings, ranked
from patchrank.losses import Loss, kendall_tau, pruned_overlap, ranking_loss
from patchrank.predictor import RankPredictor, load_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.prompts import Kind, Prompts, words_by_layer
from patchrank.scores import Score, keep_count
from patchrank.tower import PatchRankTower


class RankPredictorTraining(TrainedPart):
    """Train a predictor to rank patch tokens as their golden ranking does; the CLIP is frozen.

    The golden rankings of the training pictures are computed before the first step and kept on disk, so the data
    must show its training pictures as evaluation does (augment: false). The paper states neither loss nor
    schedule; the loss is the released code's, AdamW and cosine stand for its Adam.

    Args:
        architecture: an open_clip model name (ViT-B-16-quickgelu) or a .json architecture file.
        weights: null (random), an open_clip tag, or a local file.
        quick_gelu: the activation of a local weights file that does not record it.
        prune_layer: the block before which tokens are scored and pruned.
        keep: share of patch tokens that will be kept, below 1; the loss "keep_set" and the overlap depend on it.
        loss: keep_set (divergence from the golden keep set), margin (hinge over all ordered pairs) or listwise
            (likelihood of the golden order).
        score: what the golden ranking preserves: feature, or the data's classes by label or confidence.
        block: side of the removed windows, in patches.
        stride: of the windows; block for such that do not overlap.
        rounds: greedy rounds of the golden ranking.
        removed_per_round: tokens that each round but the last removes; needed above one round.
        learning_rate: peak rate of AdamW.
        weight_decay: of matrices.
        warmup_steps: steps of linear warm-up before the cosine.
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16-quickgelu",
        weights: str | None = None,
        quick_gelu: bool | None = None,
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
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.clip = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu).requires_grad_(False)
        tower = self.clip.image_tower
        self.predictor = RankPredictor.for_tower(tower)
        self.pruned = tower.grid**2 - keep_count(keep, tower.grid**2)
        if not self.pruned:
            raise ValueError(f"keep {keep} prunes nothing of {tower.grid**2} patch tokens; train for a rate below 1")
        if not 0 <= prune_layer < len(tower.transformer.resblocks):
            raise ValueError(f"prune_layer {prune_layer} is none of the {len(tower.transformer.resblocks)} blocks")
        self.prune_layer, self.loss, self.score = prune_layer, loss, score
        self.removal = {"block": block, "stride": stride, "rounds": rounds, "removed_per_round": removed_per_round}
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.overlap, self.tau = MeanMetric(), MeanMetric()
        self._golden: dict[str, Rankings] = {}

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> scores [B,N], high = keep."""
        tower = self.clip.image_tower
        with torch.no_grad():
            x = tower.run_blocks(tower.embed(images), stop=self.prune_layer)
        return self.predictor(x)

    def setup(self, stage: str) -> None:
        """Forget the rankings of an earlier run, which may have shown other pictures."""
        self._golden = {}

    def on_fit_start(self) -> None:
        """Rank the training pictures. ValueError: random views of them, or several processes."""
        data = self.trainer.datamodule
        if getattr(data, "augment", True):
            raise ValueError("golden rankings are of one view of a picture; set the data's augment: false")
        if self.trainer.world_size > 1:
            raise ValueError(f"{self.trainer.world_size} processes: a predictor is trained by one; set devices: 1")
        self._golden["train"] = self._rank(data.dataloader("train", train=False))

    def _rank(self, batches: Iterable[dict[str, Any]]) -> Rankings:
        settings = {"prune_layer": self.prune_layer, **self.removal}
        if self.score != "feature":
            classes = embed_prompts(self.clip, _class_prompts(self.trainer))
            settings |= {"class_embeddings": classes, "logit_scale": self.clip.logit_scale.exp()}
        return ranked(self.clip.image_tower, batches, self.score, **settings)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of the predicted scores against the golden orders."""
        order = self._golden["train"].of(batch["key"]).to(self.device)
        loss = ranking_loss(self.loss, self(batch["image"]), order, self.pruned)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Rank the pictures that validation will show."""
        if "val" not in self._golden:
            self._golden["val"] = self._rank(_shown(self.trainer.val_dataloaders, self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Rank the pictures that the test will show."""
        self._golden["test"] = self._rank(_shown(self.trainer.test_dataloaders, self.trainer.num_test_batches))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Overlap of the pruned sets, and Kendall's τ over all tokens."""
        self._agreement(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """The same on the test split, whose golden rankings no pruning ever sees."""
        self._agreement(batch, "test")

    def _agreement(self, batch: dict, split: str) -> None:
        order = self._golden[split].of(batch["key"]).to(self.device)
        scores = self(batch["image"])
        self.overlap.update(pruned_overlap(scores, order, self.pruned))
        self.tau.update(kendall_tau(scores, order))
        self.log_dict({f"{split}_overlap": self.overlap, f"{split}_tau": self.tau}, prog_bar=True)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the predicted scores [B,N] of its pictures."""
        return {"key": batch["key"], "scores": self(batch["image"])}

    def configure_optimizers(self) -> dict:
        """AdamW, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches)

    def deployable(self) -> tuple[PatchRankTower, CLIP]:
        """The image tower that prunes by this predictor, and the CLIP whose texts it is read against."""
        tower = PatchRankTower(self.clip.image_tower, self.predictor, self.hparams.keep, self.prune_layer)
        return tower, self.clip


def _shown(batches: Iterable[dict[str, Any]], limits: list[int | float]) -> Iterable[dict[str, Any]]:
    """The batches of one loader, as many as the trainer will take."""
    limit = limits[0]
    return islice(batches, None if limit == float("inf") else int(limit))


class PromptTuning(TrainedPart):
    """Tune prompts for few-shot classification while the predictor prunes; CLIP and predictor are frozen.

    The loss is the cross-entropy of CLIP's zero-shot scores, the class embeddings being those of the current text
    prompts. The paper states no number, depth or schedule; the defaults are MaPLe's, which its code contains.
    Rankings are not learned anew: the predictor reads what the prompts make of the tokens.

    Args:
        architecture: an open_clip model name (ViT-B-16-quickgelu) or a .json architecture file.
        weights: null (random), an open_clip tag, or a local file.
        quick_gelu: the activation of a local weights file that does not record it.
        predictor: a checkpoint of RankPredictorTraining or a PatchRankTower's file; null is for keep 1 alone.
        keep: share of patch tokens that stays; 1 tunes without pruning.
        prune_layer: the block before which tokens are pruned.
        kind: coupled (text prompts, and image prompts mapped from them), independent (both), text or visual.
        prompts: how many each prompted encoder gets.
        depth: how many layers have prompts of their own.
        words: text whose words the text prompts start as, one prompt each; null: at random.
        template: class prompt with {} for the name; null: the data's own. Text prompts stand before it.
        learning_rate: peak rate of SGD.
        momentum: of SGD.
        weight_decay: of prompts and couplings, biases apart.
        warmup_steps: steps of linear warm-up before the cosine.
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16-quickgelu",
        weights: str | None = None,
        quick_gelu: bool | None = None,
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        clip = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu)
        ranks = None if predictor is None else load_predictor(predictor, clip.image_tower, prune_layer)
        widths = clip.text_tower.ln_final.normalized_shape[0], clip.image_tower.ln_post.normalized_shape[0]
        start = None if words is None else _words(clip, words, kind, depth)
        learned = Prompts(kind, prompts, depth, *widths, start=start)
        self.model = PromptedCLIP(clip, PatchRankTower(clip.image_tower, ranks, keep, prune_layer, learned))
        self.model.requires_grad_(False)
        learned.requires_grad_(True)
        self.template = template
        self.learning_rate, self.momentum = learning_rate, momentum
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.top1 = MeanMetric()
        self._ids: Tensor | None = None
        self._classes: Tensor | None = None

    @property
    def prompts(self) -> Prompts:
        """What is trained; ``prompts.save(path)`` writes what inference needs of it."""
        return self.model.tower.prompts

    def setup(self, stage: str) -> None:
        """Tokenise the class prompts, and forget how an earlier run embedded its own. ValueError: no classes."""
        texts, template = _class_prompts(self.trainer), self.template
        if template is not None:
            texts = [fill(template, name) for name in self.trainer.datamodule.class_names]
        self._ids, self._classes = self.model.tokenizer(texts, longest=True), None

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> unit embeddings [B,E] of the pruned, prompted tower."""
        return self.model.encode_image(images)

    def embed_classes(self) -> Tensor:
        """Unit class embeddings [C,E] by the prompts as they are now."""
        return self.model.encode_text(self._ids.to(self.device))

    def on_fit_start(self) -> None:
        """Embed the classes once where no text prompts change them."""
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
        """Embed the classes as they are now."""
        if self.prompts.texts or self._classes is None:
            self._classes = self.embed_classes()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Accuracy by class prompt."""
        guess = (self(batch["image"]) @ self._classes.T).argmax(1)
        self.top1.update((guess == batch["label"]).float())
        self.log("val_top1", self.top1, prog_bar=True)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """The same on the test split."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the normalised embeddings [B,E] of its pictures."""
        return {"key": batch["key"], "embedding": self(batch["image"])}

    def deployable(self) -> tuple[PromptedCLIP, None]:
        """The tuned model, and whose texts it is read against beside its own: nobody's."""
        return self.model, None

    def configure_optimizers(self) -> dict:
        """SGD with momentum, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        optimizer = SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        return optim.scheduled(optimizer, self.warmup_steps, self.trainer.estimated_stepping_batches)


def _class_prompts(trainer: Trainer) -> list[str]:
    """One prompt a class, as the data has them. ValueError: it has none."""
    prompts = getattr(trainer.datamodule, "class_prompts", None)
    if prompts is None:
        raise ValueError("this training compares pictures with classes; give data that has them, such as few shots")
    return prompts


def _words(clip: CLIP, words: str, kind: Kind, depth: int) -> Tensor | None:
    """Words as prompts, one a word, in every layer; a warning and None where there are no text prompts."""
    if kind == "visual":
        rank_zero_warn(f"words {words!r} are ignored: kind visual has no text prompts")
        return None
    return words_by_layer(clip.text_tower, clip.tokenizer([words], longest=True), depth)

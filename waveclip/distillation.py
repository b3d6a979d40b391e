"""Training a WaveTower from a frozen CLIP teacher (WAVECLIP, section 3.1), with documented additions.

Shapes: B images, T text tokens, C classes or captions, E joint dim, D width, L levels, g grid of the coarse level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.contrastive import info_nce, scaled_cosines
from common.preprocess import prepare_data
from common.zeroshot import embed_prompts, similarity, training_prompts
from waveclip.growing import adopt_levels
from waveclip.tokenizer import Start
from waveclip.tower import WaveTower


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of section 3.1: 1 - cos, mean over the rows of student and teacher [B,E]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def distribution_distance(student: Tensor, teacher: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over texts [C,E], mean over the rows of student and teacher [B,E]."""
    log_p, log_q = (
        F.log_softmax(scaled_cosines(F.normalize(z, dim=-1), texts, scale), dim=-1) for z in (teacher, student)
    )
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def token_distance(wave: WaveTower, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos between the student's and the teacher's tokens of each location, before ``ln_post``.

    student: tokens of all steps [B,N,D].  teacher: its tokens [B,1+G²,D].

    A location is one of the g x g cells of the coarse grid. A band's token sees a whole cell and has no single patch
    as counterpart, so both sides are averaged over the cell: the student's four bands of the coarsest level, and the
    teacher's patches.
    """
    cells = wave.tokens_in(0) - 1  # g²
    grid = round(cells**0.5)
    # The student: LL follows the first class token; H, V and D follow the second.
    details = wave.tokens_in(0) + 1
    bands = torch.cat([student[:, 1 : 1 + cells], student[:, details : details + 3 * cells]], dim=1)
    means = bands.unflatten(1, (4, cells)).mean(1)  # [B,g²,D]
    # The teacher: its G x G patches, pooled to g x g cells.
    side = round((teacher.shape[1] - 1) ** 0.5)
    patches = teacher[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [B,D,G,G]
    target = F.avg_pool2d(patches, side // grid).flatten(2).transpose(1, 2)  # [B,g²,D]
    return cosine_distance(means.flatten(0, 1), target.flatten(0, 1))


class WaveCLIPDistillation(LightningModule):
    """Distil a frozen CLIP teacher into a WaveTower that starts as its copy; the text tower stays the teacher's.

    The loss is section 3.1's cosine distance to the teacher's full-resolution embedding, averaged over the levels.
    The paper states neither the levels' weights nor which parameters train; the mean and both choices of ``train``
    are ours. All other terms are additions, and their weights are 0 by default.

    Args:
        teacher: an open_clip model name (ViT-B-16) or a .json architecture file.
        weights: the teacher's weights: null (random), an open_clip tag, or a local file.
        quick_gelu: the activation of a local weights file that does not record it.
        image_size: side of the images in pixels, where it is not the architecture's; the weights' positions are
            interpolated to it.
        preprocess: how pictures were prepared for a local weights file of which it is not known: clip, a tag of the
            architecture that was trained alike, or open_clip's preprocess_cfg.
        levels: wavelet levels; at patch 16, 1 at 224 px, 2 at 448 px.
        wavelet: an orthogonal wavelet by its PyWavelets name.
        transform: conv (one strided convolution) or ptwt (haar only).
        shared_class_token: one class token for all levels instead of one per level.
        start: whether tokenizer, positions and class tokens start from the teacher's or at random.
        first_levels: the file of a WaveTower of fewer levels on smaller images, from which this student's coarse
            levels start (``waveclip.growing``); null: all start from the teacher.
        detail_scale: the scale of the teacher's filter that detail bands start from.
        train: all parameters, or only the new ones (tokenizer with its embeddings, and class tokens).
        learning_rate: peak rate of the optimiser.
        new_rate_factor: how many times that rate the new parameters take.
        weight_decay: of matrices.
        warmup_steps: steps of linear warm-up before the cosine.
        distribution_weight: weight of the KL divergence between teacher's and student's class probabilities: over
            the data's class prompts where its training has classes, else over the captions of the rank's own batch
            (InfoNCE gathers those of all ranks; this term does not). 0 leaves it out.
        distribution_scale: factor on the teacher's logit scale in that term; above 1 the likeliest classes count
            more and the tail less.
        contrastive_weight: weight of InfoNCE between the student and the teacher's text embeddings: the class
            prompts where the training has classes (cross-entropy with the label), else the batch's captions. 0: none.
        token_weight: weight of the cosine distance between student's and teacher's last tokens. 0: none.
        fine_first_steps: steps at the beginning in which only the last level's loss counts; fewer than the run has.
        optimizer: adamw, or muon for the matrices of the blocks and AdamW for all else (``common.muon``).
    """

    starts_from: ClassVar[dict[str, Any]] = {"weights": None, "first_levels": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        teacher: str = "ViT-B-16",
        weights: str | None = None,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        preprocess: str | dict[str, Any] | None = None,
        levels: int = 1,
        wavelet: str = "haar",
        transform: Literal["conv", "ptwt"] = "conv",
        shared_class_token: bool = False,
        start: Start = "teacher",
        first_levels: str | None = None,
        detail_scale: float = 4.0,
        train: Literal["all", "new"] = "all",
        learning_rate: float = 1e-4,
        new_rate_factor: float = 4.0,
        weight_decay: float = 0.05,
        warmup_steps: int = 500,
        distribution_weight: float = 0.0,
        distribution_scale: float = 1.0,
        contrastive_weight: float = 0.0,
        token_weight: float = 0.0,
        fine_first_steps: int = 0,
        optimizer: optim.OptimizerName = "adamw",
    ) -> None:
        super().__init__()
        optim.check_settings(learning_rate, weight_decay, warmup_steps)
        terms = {"distribution": distribution_weight, "contrastive": contrastive_weight, "token": token_weight}
        _check_terms(terms, distribution_scale, fine_first_steps)
        _check_student(train, optimizer, detail_scale, new_rate_factor)
        _warn_of_idle(distribution_weight, distribution_scale, start, detail_scale)
        self.save_hyperparameters()
        self.distribution_scale = distribution_scale
        clip = CLIP.from_open_clip(
            teacher, weights, quick_gelu=quick_gelu, image_size=image_size, preprocess=preprocess
        )
        self.hparams.preprocess = clip.architecture.get("preprocess_cfg")
        self.teacher = clip.requires_grad_(False).eval()
        self.wave = WaveTower.from_image_tower(
            self.teacher.image_tower,
            levels,
            wavelet,
            shared_class_token,
            transform=transform,
            start=start,
            detail_scale=detail_scale,
        )
        if first_levels is not None:
            adopt_levels(self.wave, WaveTower.load(first_levels))
        self.wave.requires_grad_(train == "all")
        self.wave.tokenizer.requires_grad_(True)
        self.learning_rate, self.new_rate_factor = learning_rate, new_rate_factor
        self.weight_decay, self.warmup_steps = weight_decay, warmup_steps
        self.term_weights, self.fine_first_steps = terms, fine_first_steps
        self.optimizer_name = optimizer
        self.validation_top1 = nn.ModuleList(MeanMetric() for _ in range(self.wave.steps))
        self._classes: Tensor | None = None  # of validation and test
        self._train_classes: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Show pictures as the teacher was trained on them."""
        prepare_data(self.trainer, self.teacher.preprocess)

    def train(self, mode: bool = True) -> WaveCLIPDistillation:
        """Switch to training or evaluation; the frozen teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B,3,S,S] -> (z_0, ..., z_L), each [B,E]."""
        return self.wave(images)

    def _embedded(self, prompts: Sequence[str] | None) -> Tensor | None:
        return None if prompts is None else embed_prompts(self.teacher, prompts)

    def on_fit_start(self) -> None:
        """Embed the training's class prompts once: the text tower is frozen.

        ValueError: ``fine_first_steps`` leave the other levels none.
        """
        steps = self.trainer.estimated_stepping_batches
        if self.fine_first_steps >= steps:
            raise ValueError(
                f"fine_first_steps {self.fine_first_steps} is not below the run's {steps} steps, so no other level "
                "would train; shorten it, or lengthen the run by trainer.max_steps"
            )
        self._train_classes = self._embedded(training_prompts(self.trainer.datamodule))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The distillation loss of one batch: section 3.1's term and the additions, each logged apart."""
        images = batch["image"]
        with torch.no_grad():
            target_tokens = self.teacher.image_tower.run_blocks(self.teacher.image_tower.embed(images))
            target = self.teacher.image_tower.pool(target_tokens)
        tokens = self.wave.run_blocks(self.wave.embed(images), mask=self.wave.mask)
        levels = self.wave.pool(tokens)
        counted = levels[-1:] if self.global_step < self.fine_first_steps else levels
        terms = {"cosine": _mean([cosine_distance(z, target) for z in counted])}
        if self.term_weights["token"]:
            terms["token"] = token_distance(self.wave, tokens, target_tokens)
        terms.update(self._text_terms(batch, counted, target))
        loss = sum(value * self.term_weights.get(name, 1.0) for name, value in terms.items())
        self.log_dict({f"train_{name}": value for name, value in terms.items()})
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _text_terms(self, batch: dict, levels: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """The terms with a weight that compare the student's embeddings with the teacher's texts."""
        if not (self.term_weights["contrastive"] or self.term_weights["distribution"]):
            return {}
        scale, terms = self.teacher.logit_scale.exp(), {}
        texts = self._captions(batch) if self._train_classes is None else self._train_classes
        if self.term_weights["distribution"]:
            sharp = self.distribution_scale * scale
            terms["distribution"] = _mean([distribution_distance(z, target, texts, sharp) for z in levels])
        if self.term_weights["contrastive"]:
            terms["contrastive"] = _mean([self._contrast(F.normalize(z, dim=-1), texts, scale, batch) for z in levels])
        return terms

    def _captions(self, batch: dict) -> Tensor:
        if "text" not in batch:
            raise ValueError("a term compares with captions the data does not have; set its captions: true")
        with torch.no_grad():
            return self.teacher.encode_text(batch["text"])

    def _contrast(self, z: Tensor, texts: Tensor, scale: Tensor, batch: dict) -> Tensor:
        if self._train_classes is None:
            return info_nce(z, texts, scale, same=batch["caption_id"])
        return F.cross_entropy(scaled_cosines(z, texts, scale), batch["label"])

    def on_validation_epoch_start(self) -> None:
        """Embed the class prompts, also when validation runs without a fit."""
        self._classes = self._embedded(getattr(self.trainer.datamodule, "class_prompts", None))

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Zero-shot accuracy of every level where there are classes; the cosine distance otherwise."""
        levels = self.wave(batch["image"])
        if self._classes is None:
            target = self.teacher.encode_image(batch["image"])
            for level, z in enumerate(levels):
                distance = cosine_distance(z, target)
                self.log(f"val_cosine_{level}", distance, sync_dist=True, batch_size=len(z))
            return
        for level, (z, metric) in enumerate(zip(levels, self.validation_top1, strict=True)):
            guess = similarity(z, self._classes).argmax(1)
            metric.update((guess == batch["label"]).float())
            self.log(f"val_top1_{level}", metric, prog_bar=True)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """As validation, on the test split."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the normalised embeddings [B,E] of its images, last level."""
        return {"key": batch["key"], "embedding": self.wave.encode_image(batch["image"])}

    def deployable(self) -> tuple[WaveTower, CLIP]:
        """The trained tower, and the CLIP whose text tower goes with it."""
        return self.wave, self.teacher

    def configure_optimizers(self) -> dict:
        """A higher rate for new parameters, per-step warm-up, and a cosine over the trainer's whole run."""
        new = list(self.wave.tokenizer.parameters())
        rates = self.learning_rate, self.weight_decay, new, self.new_rate_factor
        groups = optim.parameter_groups(self, *rates, optimizer=self.optimizer_name)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches)


def _check_terms(weights: dict[str, float], distribution_scale: float, fine_first_steps: int) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}_weight {value} must be finite and not negative; 0 leaves the term out")
    if not 0 < distribution_scale < math.inf:
        raise ValueError(
            f"distribution_scale {distribution_scale} must be finite and positive; 1 keeps the teacher's scale"
        )
    if fine_first_steps < 0:
        raise ValueError(
            f"fine_first_steps {fine_first_steps} must not be negative; 0 counts all levels from the start"
        )


def _check_student(train: str, optimizer: str, detail_scale: float, new_rate_factor: float) -> None:
    if train not in ("all", "new"):
        raise ValueError(f"train {train!r} is neither all nor new")
    if train == "new" and optimizer == "muon":
        raise ValueError("train new leaves optimizer muon no matrices of blocks to train; take optimizer adamw")
    if not 0 <= detail_scale < math.inf:
        raise ValueError(f"detail_scale {detail_scale} must be finite and not negative; 1 keeps the teacher's filter")
    if not 0 < new_rate_factor < math.inf:
        raise ValueError(f"new_rate_factor {new_rate_factor} must be finite and positive; 1 takes the others' rate")


def _warn_of_idle(distribution_weight: float, distribution_scale: float, start: Start, detail_scale: float) -> None:
    """Name what is set but not read."""
    if not distribution_weight and distribution_scale != 1:
        rank_zero_warn(f"distribution_scale {distribution_scale} is ignored: distribution_weight is 0")
    if start == "random" and detail_scale != 4:
        rank_zero_warn(f"detail_scale {detail_scale} is ignored: start random takes no filter of the teacher's")


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()

"""What the trainings of MLIP's baselines share: MLIP's data path and tower, without its alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.optim import OptimizerName
from mlip.pretraining import MLIPPretraining


class BaselinePretraining(MLIPPretraining):
    """The base class of SLIP, DeCLIP and FILIP: MLIPPretraining with those of its settings that concern them.

    Args:
        terms: the arguments of MLIPPretraining that a baseline's own stand for.
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: what text tower and scale start from: null (random), an open_clip tag, or a local weights file.
        preprocess, quick_gelu: as MLIPPretraining's.
        image_layers: how many of the image tower's last layers start from those weights too; see MLIPPretraining.
        frequency_layers, keep_rates, guide, guide_heads: MLIP's tower in the place of CLIP's; by default there is none
            of it.
        label_smoothing: share of each contrastive target spread over all candidates, in [0, 1).
        parts: number of parts in which a batch passes through the towers; see ``common.two_pass``.
        learning_rate: peak rate of the optimiser.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        optimizer: adamw or muon, as MLIPPretraining's; the heads are with AdamW.
    """

    def __init__(
        self,
        terms: Mapping[str, Any],
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        preprocess: str | dict[str, Any] | None = None,
        quick_gelu: bool | None = None,
        image_layers: int = 0,
        frequency_layers: int = 0,
        keep_rates: dict[int, float] | None = None,
        guide: str | None = None,
        guide_heads: int | None = None,
        label_smoothing: float = 0.0,
        parts: int = 1,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 2500,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        super().__init__(
            architecture,
            weights,
            preprocess,
            quick_gelu,
            image_layers=image_layers,
            frequency_layers=frequency_layers,
            keep_rates=keep_rates,
            guide=guide,
            guide_heads=guide_heads,
            label_smoothing=label_smoothing,
            parts=parts,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            optimizer=optimizer,
            frequency_weight=0.0,
            frequency_token_weight=0.0,
            spatial_token_weight=0.0,
            **terms,
        )
        # A checkpoint rebuilds the baseline from its own arguments, and from the preprocessing that its weights tell.
        resolved = self.hparams.preprocess
        self.hparams.clear()
        self.save_hyperparameters(ignore=["terms"])
        self.hparams.preprocess = resolved

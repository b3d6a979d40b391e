"""MLIP as a model to train, save and evaluate: a CLIP whose image tower is an MLIPTower.

Shapes: B images, S image size, E joint dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.clip import CLIP
from common.preprocess import Preprocess
from common.weights import load_saved, save_model
from mlip.guide import Guide
from mlip.tower import MLIPTower


class MLIP(CLIP):
    """A CLIP whose ``image_tower`` is an ``MLIPTower``; without the options it is a plain CLIP.

    architecture: in open_clip's model-config format.
    options: the keyword arguments of ``MLIPTower`` that follow the sizes; files record them with the weights.
    """

    image_tower: MLIPTower

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        frequency_layers: int = 0,
        keep_rates: Mapping[int, float] | None = None,
        guide: Guide | None = None,
        **options: Any,
    ) -> None:
        rates = {int(layer): rate for layer, rate in (keep_rates or {}).items()}  # a file's keys are text
        chosen = {"frequency_layers": frequency_layers, "keep_rates": rates, **options}
        if guide is not None:
            guide.see_as(Preprocess.of(architecture))
        super().__init__(architecture, MLIPTower.from_architecture(architecture, guide=guide, **chosen))
        self.options = {**chosen, "guide": guide.sizes if guide is not None else None}

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> the spatial embedding [B,E], of length 1 unless told otherwise."""
        return self.image_tower.encode_image(images, normalize)

    def penultimate(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> the class token [B,D] before projection."""
        return self.image_tower.penultimate(images)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write weights (the Guide's too), architecture, activation and options as one safetensors file."""
        architecture = {**self.architecture, "quick_gelu": self.quick_gelu}
        save_model(self, path, {"architecture": architecture, "mlip": self.options}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> MLIP:
        """Read a file that ``save`` wrote. ValueError: another kind of file."""

        def build(record: dict[str, Any]) -> MLIP:
            sizes = record["mlip"]["guide"]
            guide = None if sizes is None else Guide(**sizes)
            return cls(record["architecture"], **{**record["mlip"], "guide": guide})

        return load_saved(
            path, {"architecture", "mlip"}, "records no MLIP; convert its training checkpoint first", build
        )

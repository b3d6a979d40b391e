"""A whole CLIP with prompts: the pruned image tower, and the text tower that reads the same prompts.

Shapes: B images or texts, S image size, T text tokens, E joint dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP
from common.weights import load_saved, save_model
from patchrank.prompts import check_depth, prompted_text
from patchrank.tower import PatchRankTower


class PromptedCLIP(nn.Module):
    """``clip`` with its image tower replaced by ``tower``; its text tower reads the tower's prompts too.

    clip: gives text tower, scale and tokenizer, which are shared, not copied. A PromptedCLIP serves as well.
    tower: made from the clip's image tower.
    ValueError: prompts in more layers than an encoder has.
    """

    tuned_for_templates = True
    """The prompts were tuned with certain class prompts, so evaluation embeds the classes by those."""

    def __init__(self, clip: CLIP | PromptedCLIP, tower: PatchRankTower) -> None:
        super().__init__()
        if tower.prompts is not None and tower.prompts.texts:
            check_depth(tower.prompts, clip.text_tower)
        self.architecture, self.tokenizer = clip.architecture, clip.tokenizer
        self.tower, self.text_tower, self.logit_scale = tower, clip.text_tower, clip.logit_scale

    @property
    def prunable(self) -> bool:
        """Whether the image tower can prune at any rate."""
        return self.tower.prunable

    @property
    def keep(self) -> float:
        """Share of the patch tokens that stay."""
        return self.tower.keep

    def at(self, keep: float) -> PromptedCLIP:
        """This model at another keep rate, with shared weights. ValueError: see ``PatchRankTower``."""
        return PromptedCLIP(self, self.tower.at(keep)).train(self.training)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> embeddings [B,E], of length 1 unless ``normalize`` is off."""
        return self.tower.encode_image(images, normalize)

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids [B,T] -> embeddings [B,E], of length 1 unless ``normalize`` is off."""
        prompts = self.tower.prompts
        z = self.text_tower(ids) if prompts is None else prompted_text(self.text_tower, ids, prompts)
        return F.normalize(z, dim=-1) if normalize else z

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the whole model, prompts evaluated, as one self-describing safetensors file."""
        model = PromptedCLIP(self, self.tower.exported())
        save_model(model, path, {"architecture": self.architecture, "prompted": model.tower.record()}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> PromptedCLIP:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> PromptedCLIP:
            clip = CLIP(record["architecture"])
            return cls(clip, PatchRankTower.from_record(clip.image_tower, record["prompted"]))

        problem = "does not describe a PromptedCLIP; save one after tuning first"
        return load_saved(path, {"architecture", "prompted"}, problem, build)

"""FILIP (Yao et al., 2021) as Cui et al. (2022) train it, by late interaction alone; a baseline of MLIP's tables.

Shapes: B pairs, S image size, N image tokens, T text tokens, P width of a compared token, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.preprocess import Preprocess
from common.two_pass import in_parts
from common.weights import load_saved, save_model
from mlip.alignment import caption_mask, late_interaction, similarities_from_images
from mlip.baseline import BaselinePretraining
from mlip.guide import Guide
from mlip.model import MLIP


class FILIP(nn.Module):
    """A CLIP that compares tokens: each tower's tokens are mapped to P, and scored by late interaction.

    clip: gives both towers, scale and tokenizer. Its projections to the joint space are not used.
    token_dim: P; 256 in Cui et al.
    """

    def __init__(self, clip: MLIP, token_dim: int = 256) -> None:
        super().__init__()
        self.clip, self.token_dim = clip, token_dim
        sizes = clip.architecture
        self.image_head = nn.Linear(sizes["vision_cfg"]["width"], token_dim)
        self.text_head = nn.Linear(sizes["text_cfg"]["width"], token_dim)
        for unused in (clip.image_tower.vit.proj, clip.text_tower.text_projection):
            unused.requires_grad_(False)  # DDP would wait for their gradients

    @property
    def architecture(self) -> dict[str, Any]:
        """The CLIP's, in open_clip's model-config format."""
        return self.clip.architecture

    @property
    def tokenizer(self) -> Callable[..., Tensor]:
        """The CLIP's."""
        return self.clip.tokenizer

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the similarities' multiplier."""
        return self.clip.logit_scale

    @property
    def preprocess(self) -> Preprocess:
        """The CLIP's."""
        return self.clip.preprocess

    def image_tokens(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> patch tokens [B,N,P], not normalised; the class token is not one of them."""
        return self.image_head(self.clip.image_tower.normalised_tokens(images)[:, 1:])

    def text_tokens(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> tokens [B,T,P], not normalised; ``caption_mask`` says which are real."""
        return self.text_head(self.clip.text_tower.normalised_tokens(ids))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> the mean [B,P] of the unit tokens, of length 1 unless ``normalize`` is off."""
        z = F.normalize(self.image_tokens(images), dim=-1).mean(1)
        return F.normalize(z, dim=-1) if normalize else z

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids [B,T] -> the mean [B,P] of the real unit tokens, of length 1 unless ``normalize`` is off."""
        mask = caption_mask(ids)
        tokens = F.normalize(self.text_tokens(ids), dim=-1) * mask[..., None]
        z = tokens.sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(z, dim=-1) if normalize else z

    @torch.no_grad()
    def class_scorer(self, prompts: Sequence[Sequence[str]]) -> Callable[[Tensor], Tensor]:
        """The function images [B,3,S,S] -> scores [B,C]: late interaction from the image, averaged over prompts.

        prompts: as many for every class; ValueError: other numbers.
        """
        if len(numbers := {len(texts) for texts in prompts}) != 1:
            raise ValueError(f"{sorted(numbers)} prompts for the classes; give as many for every class")
        device = self.image_head.weight.device
        ids = self.tokenizer([text for texts in prompts for text in texts], longest=True).to(device)
        text = torch.cat([F.normalize(self.text_tokens(part).float(), dim=-1) for part in ids.split(512)])
        mask = caption_mask(ids)

        @torch.no_grad()
        def score(images: Tensor) -> Tensor:
            image = F.normalize(self.image_tokens(images.to(device)).float(), dim=-1)
            return similarities_from_images(image, text, mask).unflatten(1, (len(prompts), -1)).mean(2)

        return score

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write weights, architecture and options as one safetensors file."""
        architecture = {**self.architecture, "quick_gelu": self.clip.quick_gelu}
        record = {"architecture": architecture, "filip": {**self.clip.options, "token_dim": self.token_dim}}
        save_model(self, path, record, dtype)

    @classmethod
    def load(cls, path: str | Path) -> FILIP:
        """Read a file that ``save`` wrote. ValueError: another kind of file."""

        def build(record: dict[str, Any]) -> FILIP:
            options = dict(record["filip"])
            token_dim, sizes = options.pop("token_dim"), options.pop("guide")
            return cls(MLIP(record["architecture"], guide=sizes and Guide(**sizes), **options), token_dim)

        return load_saved(path, {"architecture", "filip"}, "records no FILIP", build)


class FILIPPretraining(BaselinePretraining):
    """Train a FILIP by late interaction of all pairs alone, as Cui et al. have it.

    A token chooses among the ``keys`` tokens of a caption or picture that agree most with their own partner. Padding
    is left out, which Cui et al. keep. Validation compares the means of the tokens; ``effclip evaluate`` classifies by
    tokens.

    Args:
        token_dim: width of the compared tokens.
        keys: how many tokens of the other side a token may choose from.
        settings: see ``BaselinePretraining``.
    """

    def __init__(
        self,
        *,
        token_dim: int = 256,
        keys: int = 16,
        **settings: Any,
    ) -> None:
        for name, value in {"token_dim": token_dim, "keys": keys}.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1; Cui et al. have 256-wide tokens and 16 keys")
        super().__init__({"spatial_weight": 1.0}, **settings)
        self.weights, self.keys = {"late_interaction": 1.0}, keys
        self.clip = FILIP(self.clip, token_dim)

    def _embed(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,P] of images [B,3,S,S], and [B,T,P] of ids [B,T]."""
        return self.clip.image_tokens(images), self.clip.text_tokens(ids)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The one term of a batch."""
        image, text = in_parts(self._embed, self.parts, batch["image"], batch["text"])
        shared = {"same": batch["caption_id"], "label_smoothing": self.label_smoothing, "keys": self.keys}
        mask = caption_mask(batch["text"])
        return {"late_interaction": late_interaction(image, text, mask, self.clip.logit_scale.exp(), **shared)}

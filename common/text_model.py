"""The text side of a CLIP: what zero-shot classification needs besides an image tower.

Shapes: B texts, T text tokens, E joint dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP
from common.tokenizer import Tokenizer
from common.tower import TextTower
from common.weights import load_saved, save_model


class TextModel(nn.Module):
    """Text tower, logit scale (a logarithm) and tokenizer of a CLIP. architecture: in open_clip's format."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.architecture = architecture
        text = dict(architecture["text_cfg"])
        self.tokenizer = Tokenizer(text["context_length"], text.pop("vocabulary", None))
        quick_gelu = bool(architecture.get("quick_gelu", False))
        self.text_tower = TextTower(**text, embed_dim=architecture["embed_dim"], quick_gelu=quick_gelu)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @classmethod
    def of(cls, clip: CLIP) -> TextModel:
        """The text side of a CLIP; the weights are shared, not copied."""
        model = cls({**clip.architecture, "quick_gelu": clip.quick_gelu})
        model.text_tower, model.logit_scale = clip.text_tower, clip.logit_scale
        return model

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids [B,T] -> embeddings [B,E], of length 1 if ``normalize``."""
        z = self.text_tower(ids)
        return F.normalize(z, dim=-1) if normalize else z

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write weights, architecture and vocabulary as one safetensors file."""
        save_model(self, path, {"architecture": self.architecture, "text": {}}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> TextModel:
        """Read a file that ``save`` wrote. ValueError for any other."""
        problem = "holds no text tower alone; `effclip convert` writes one"
        return load_saved(path, {"architecture", "text"}, problem, lambda record: cls(record["architecture"]))

"""The models of WAVECLIP's Table 2: real architectures, and their released weights from one file each.

Shapes: B images or texts, T text tokens, E joint dim, S image size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.utils import reparameterize_model
from torch import Tensor, nn

from common.clip import CLIP, load_architecture, read_record, read_state_dict
from common.tokenizer import Tokenizer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def tinyclip_architecture(layers: int, width: int, text_layers: int, text_width: int) -> dict[str, Any]:
    """A ViT of TinyCLIP (K. Wu et al., ICCV 2023) with 16 px patches, by its published sizes."""
    return {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "layers": layers, "width": width},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "layers": text_layers,
            "width": text_width,
            "heads": text_width // 64,
        },
    }


@dataclass(frozen=True)
class Baseline:
    """One model of the table.

    architecture: in open_clip's model-config format.
    released: the published weights that the row stands for.
    tokens: how many the image tower's blocks see; None for a convolutional tower.
    preprocess: what open_clip's evaluation transform needs beside the size.
    note: what a reader of the row must know.
    """

    architecture: dict[str, Any]
    released: str
    tokens: int | None
    preprocess: dict[str, Any] | None = None
    note: str = ""

    @property
    def image_size(self) -> int:
        """S, the side of the pictures in pixels."""
        return self.architecture["vision_cfg"]["image_size"]

    def transform(self) -> Callable[..., Tensor]:
        """PIL picture -> [3,S,S]: shorter side to S, centre crop, the released weights' normalisation."""
        return image_transform_v2(PreprocessCfg(size=self.image_size, **(self.preprocess or {})), is_train=False)

    def build(self, weights: Path | None = None) -> CLIP | MobileCLIP:
        """The model in evaluation mode, with random weights (None) or a file's.

        ValueError: keys or shapes that do not fit, or a file that records another architecture.
        """
        family = MobileCLIP if "timm_model_name" in self.architecture["vision_cfg"] else _vit
        return family(self.architecture, weights).eval()

    def countable_tower(self) -> nn.Module:
        """The image tower with weights of no meaning, for counting: drawing random ones takes longer than the count."""
        with torch.device("meta"):
            tower = self.build().image_tower
        return tower.to_empty(device="cpu")


def _vit(architecture: dict[str, Any], weights: Path | None) -> CLIP:
    """A CLIP of our own towers. A file that records its activation has the last word on it."""
    if weights is None:
        return CLIP(architecture)
    recorded = read_record(weights).get("architecture")
    if recorded is not None:
        for key in ("embed_dim", "vision_cfg", "text_cfg"):
            if recorded[key] != architecture[key]:
                raise ValueError(f"{weights} records {key} {recorded[key]}, this row has {architecture[key]}")
        architecture = recorded
    clip = CLIP(architecture)
    state = read_state_dict(str(weights))
    clip.load_weights({tinyclip_key(key): value for key, value in state.items()}, str(weights))
    return clip


def tinyclip_key(key: str) -> str:
    """A key of TinyCLIP's released checkpoints -> open_clip's.

    They were saved from three separately distributed parts, ``_image_encoder.module.visual...``,
    ``_text_encoder.module...`` and ``_logit_scale.module.logit_scale``. Other keys pass unchanged.
    """
    return re.sub(r"^_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?(\.module)*\.", "", key)


class MobileCLIP(nn.Module):
    """A MobileCLIP of open_clip (image towers by timm), its training branches folded into one.

    ``image_tower``: images [B,3,S,S] -> [B,E];  ``text_tower``: ids [B,T] -> [B,E];  ``tokenizer``.
    """

    def __init__(self, architecture: dict[str, Any], weights: Path | None = None) -> None:
        super().__init__()
        sections = {key: architecture[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        model = open_clip.CustomTextCLIP(**sections)
        if weights is not None:
            state = read_state_dict(str(weights))
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"{weights} does not fit this architecture: {str(error)[:400]}") from error
        self.image_tower = reparameterize_model(model.visual.eval())
        self.text_tower = model.text
        self.tokenizer = Tokenizer(architecture["text_cfg"]["context_length"])

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> embeddings [B,E], not normalised."""
        return self.image_tower(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> embeddings [B,E], not normalised."""
        return self.text_tower(ids)


def _mobileclip(name: str, tag: str, tokens: int | None, note: str = "") -> Baseline:
    """The row's architecture at 224 px, and its weights' own normalisation (plain [0, 1])."""
    architecture = open_clip.get_model_config(name)
    architecture["vision_cfg"]["image_size"] = 224
    released = open_clip.get_pretrained_cfg(name, tag)
    preprocess = {key: released[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return Baseline(architecture, f"{name} {tag} (open_clip)", tokens, preprocess, note)


WAVECLIP = "waveclip-vit-b-16"
"""The student's file: one model serves all of WAVECLIP's rows."""
TEACHER = "clip-vit-b-16"
"""The row whose text tower WAVECLIP's rows use."""

BASELINES: dict[str, Baseline] = {
    "tinyclip-vit-8m-16": Baseline(
        tinyclip_architecture(10, 256, 3, 256), "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt (TinyCLIP)", 197
    ),
    "open-clip-vit-b-32": Baseline(
        load_architecture("ViT-B-32-quickgelu"), "ViT-B-32-quickgelu laion400m_e32 (open_clip)", 50
    ),
    "tinyclip-vit-39m-16": Baseline(
        tinyclip_architecture(12, 512, 6, 512), "TinyCLIP-ViT-39M-16-Text-19M-YFCC15M.pt (TinyCLIP)", 197
    ),
    "mobileclip-s2": _mobileclip(
        "MobileCLIP-S2",
        "datacompdr",
        None,
        "counted at 224 px like every row, with its training branches folded; at its native 256 px it is "
        "7.82, and the paper's 7.11 is neither",
    ),
    TEACHER: Baseline(load_architecture("ViT-B-16-quickgelu"), "ViT-B-16-quickgelu openai (open_clip)", 197),
    "mobileclip-b": _mobileclip("MobileCLIP-B", "datacompdr", 197),
    "mobileclip2-b": _mobileclip("MobileCLIP2-B", "dfndr2b", 197),
}
"""The table's models by the stem of their weights file."""


def weights_file(folder: Path, name: str) -> Path | None:
    """The file of one row in ``folder``: ``name`` with one of SUFFIXES; None when there is none.

    ValueError: more than one.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{name} has {len(found)} files in {folder}: {[f.name for f in found]}; keep one")
    return found[0] if found else None

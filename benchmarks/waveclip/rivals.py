"""The models of WAVECLIP's Table 2: their real architectures, and released weights from one file each.

Shapes: S image size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from common.clip import CLIP, load_architecture
from common.models import OpenClip
from common.preprocess import Preprocess, choose_preprocess
from common.tokenizer import Tokenizer
from common.weights import read_record, read_state_dict

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""What the name of a weights file may end with."""


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
    released: the published weights of this architecture.
    tokens: of the image tower's blocks; None for a convolutional tower.
    foreign: the preprocessing of the released weights, for a tower of timm that open_clip builds.
    note: a remark to the row.
    """

    architecture: dict[str, Any]
    released: str
    tokens: int | None
    foreign: Preprocess | None = None
    note: str = ""

    @property
    def image_size(self) -> int:
        """S, the side of the pictures in pixels."""
        return self.architecture["vision_cfg"]["image_size"]

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Image -> [3,S,S], prepared as for the released weights."""
        preprocess = replace(self.foreign or Preprocess(), size=self.image_size)
        return image_transform_v2(PreprocessCfg(**asdict(preprocess)), is_train=False)

    def build(self, weights: Path | None = None) -> CLIP | OpenClip:
        """The model in evaluation mode, with random weights (None) or those of a file.

        ValueError: keys or shapes that do not fit, or a file that records another architecture.
        """
        if self.foreign:
            return _mobileclip(self.architecture, weights).eval()
        return _vit(self.architecture, weights).eval()

    def countable_tower(self) -> nn.Module:
        """The image tower with weights of no meaning, for counting: drawing random ones takes longer than the count."""
        with torch.device("meta"):
            model = self.build()
        tower = model.model.visual if isinstance(model, OpenClip) else model.image_tower
        return tower.to_empty(device="cpu")


def _vit(architecture: dict[str, Any], weights: Path | None) -> CLIP:
    """A CLIP of our own towers. The activation is that of the file, if it records one."""
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


def _mobileclip(architecture: dict[str, Any], weights: Path | None) -> OpenClip:
    """A MobileCLIP of open_clip (image towers by timm), its training branches folded into one."""
    sections = {key: architecture[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    model = open_clip.CustomTextCLIP(**sections)
    if weights is not None:
        try:
            model.load_state_dict(read_state_dict(str(weights)))
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit this architecture: {str(error)[:400]}") from error
    return OpenClip(model, Tokenizer(architecture["text_cfg"]["context_length"]))


def _mobileclip_row(name: str, tag: str, tokens: int | None, note: str = "") -> Baseline:
    """A row of the architecture at 224 px; its weights want plain [0, 1]."""
    architecture = open_clip.get_model_config(name)
    architecture["vision_cfg"]["image_size"] = 224
    return Baseline(architecture, f"{name} {tag} (open_clip)", tokens, choose_preprocess(name, tag, None, 224), note)


WAVECLIP = "waveclip-vit-b-16"
"""The weights file of the student: one model serves all of WAVECLIP's rows."""
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
    "mobileclip-s2": _mobileclip_row(
        "MobileCLIP-S2",
        "datacompdr",
        None,
        "counted at 224 px like every row, with its training branches folded; at its native 256 px it is "
        "7.82, and the paper's 7.11 is neither",
    ),
    TEACHER: Baseline(load_architecture("ViT-B-16-quickgelu"), "ViT-B-16-quickgelu openai (open_clip)", 197),
    "mobileclip-b": _mobileclip_row("MobileCLIP-B", "datacompdr", 197),
    "mobileclip2-b": _mobileclip_row("MobileCLIP2-B", "dfndr2b", 197),
}
"""The table's models by the stem of their weights file."""


def weights_file(folder: Path, name: str) -> Path | None:
    """The file of one row in ``folder``: ``name`` with one of SUFFIXES; None when there is none.

    ValueError: more than one.
    """
    files = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(files) > 1:
        raise ValueError(f"{name} has {len(files)} files in {folder}: {[file.name for file in files]}; keep one")
    return files[0] if files else None

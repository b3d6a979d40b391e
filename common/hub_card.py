"""The README.md of a CLIP's folder in open_clip's hub layout: what it is, how to load it, whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.preprocess import Preprocess

UNKNOWN = "Whose data and weights it was trained on was not recorded: say so here before you hand the model on."
_FRONT = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
---"""
"""What the hub reads of a card."""


def hub_card(architecture: Mapping[str, Any], quick_gelu: bool, credit: str) -> str:
    """The text of the card.

    architecture: in open_clip's model-config format.  credit: Markdown about licence and attribution.
    """
    vision, text, shown = architecture["vision_cfg"], architecture["text_cfg"], Preprocess.of(architecture)
    size, cut = vision["image_size"], text.get("vocabulary")
    rows = {
        "pictures": f"{size} px, patch {vision['patch_size']}, width {vision['width']}, {vision['layers']} layers",
        "texts": f"{text['context_length']} ids, width {text['width']}, {text['layers']} layers",
        "vocabulary": f"cut to {len(cut):,} ids" if cut else f"{text['vocab_size']:,} ids",
        "joint dimension": architecture["embed_dim"],
        "activation": "QuickGELU" if quick_gelu else "GELU",
        "preprocessing": f"{shown.interpolation}, {shown.resize_mode}; mean {shown.mean}, deviation {shown.std}",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    tokenizer = 'open_clip.get_tokenizer("local-dir:FOLDER")'
    if cut:  # which open_clip does not know
        tokenizer = 'common.clip.CLIP.load("FOLDER/open_clip_model.safetensors").tokenizer'
    use = [
        "```python",
        "import open_clip",
        "",
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")  # on the hub: hf-hub:ORG/NAME',
        f"tokenizer = {tokenizer}",
        "```",
        "",
        "The suite that wrote it reads the folder too: `effclip classify PICTURES --model FOLDER`.",
    ]
    parts = [_FRONT, "# A CLIP in open_clip's hub layout", "\n".join(table), "## Load", "\n".join(use)]
    return "\n\n".join([*parts, "## Licence and attribution", credit]) + "\n"

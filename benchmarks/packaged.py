"""The model that commands use where none is named, as an entry point of the group ``effclip.packaged``."""

from __future__ import annotations

from benchmarks import WEIGHTS
from common.packaged import PackagedModel


def embedded() -> PackagedModel:
    """The embedded WaveCLIP, with the text tower of the CLIP that it was distilled from."""
    from common.data.embedded.shapes import class_names
    from common.data.embedded.twemoji import TEMPLATES

    names = class_names("seen")
    return PackagedModel(
        WEIGHTS / "shapes_waveclip.safetensors",
        WEIGHTS / "shapes_clip.safetensors",
        names,
        TEMPLATES,
        f"the embedded WaveCLIP (benchmarks/weights, 48 px): it knows {len(names):,} emoji by their shapes and nothing "
        "else, and refuses words outside of its vocabulary; --model names another",
    )

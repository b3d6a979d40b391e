"""What the tests of every package share: the architecture file of ``CLIP.tiny``, and captions in its vocabulary.

``common.data.smoke`` makes tiny shards.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.clip import CLIP

TINY_CAPTIONS = tuple(f"a {colour} {animal}" for colour in ("red", "green", "blue") for animal in ("cat", "dog"))
"""Six captions whose words are all in the tiny CLIP's vocabulary."""


def tiny_architecture(folder: Path) -> str:
    """Write the architecture of ``CLIP.tiny()`` into a folder; returns the path of the ``.json`` file."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(CLIP.tiny().architecture))
    return str(file)

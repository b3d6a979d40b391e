"""What the tests of every package share: the tiny CLIP's architecture as a file, and captions it can spell.
Tiny shards are made by ``common.data.smoke``.

The tiny CLIP itself is ``common.clip.CLIP.tiny``.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.clip import CLIP

TINY_CAPTIONS = tuple(f"a {colour} {animal}" for colour in ("red", "green", "blue") for animal in ("cat", "dog"))
"""Six captions that the tiny CLIP's vocabulary can spell."""


def tiny_architecture(folder: Path) -> str:
    """Write the architecture of ``CLIP.tiny()`` into a folder; gives the ``.json`` file's path."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(CLIP.tiny().architecture))
    return str(file)

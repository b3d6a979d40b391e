"""What the tests of every package share: the tiny CLIP's architecture as a file, and tiny shards.

The tiny CLIP itself is ``common.clip.CLIP.tiny``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from common.clip import CLIP

TINY_CAPTIONS = tuple(f"a {colour} {animal}" for colour in ("red", "green", "blue") for animal in ("cat", "dog"))
"""Six captions that the tiny CLIP's vocabulary can spell."""


def tiny_architecture(folder: Path) -> str:
    """Write the architecture of ``CLIP.tiny()`` into a folder; gives the ``.json`` file's path."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(CLIP.tiny().architecture))
    return str(file)


def jpeg(seed: int, size: int = 12) -> bytes:
    """A square picture of seeded noise as a JPEG file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(
    folder: Path, shards: int, samples: int, manifest: bool = False, **members: Callable[[int], bytes | None]
) -> str:
    """Write ``shards`` tar files of ``samples`` noise pictures with captions; gives their brace pattern.

    members: what another extension, or ``jpg`` and ``txt`` themselves, hold for the n-th sample (None:
        it has no such member). Keys are ``s<shard>-<sample>``.
    manifest: write ``manifest.json`` with the number of samples beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar"), encoder=False, mtime=0) as tar:
            for sample in range(samples):
                number = shard * samples + sample
                entry = {"jpg": jpeg(number), "txt": f"picture number {number}".encode()}
                entry |= {name: make(number) for name, make in members.items()}
                entry = {name: value for name, value in entry.items() if value is not None}
                tar.write({"__key__": f"s{shard}-{sample}", **entry})
    if manifest:
        entries = {f"{shard:03d}.tar": {"samples": samples, "sha256": ""} for shard in range(shards)}
        (folder / "manifest.json").write_text(json.dumps({"samples": shards * samples, "shards": entries}))
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"

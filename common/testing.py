"""What the tests of every package share: the tiny CLIP's architecture as a file, and tiny shards.

The tiny CLIP itself is ``common.clip.CLIP.tiny``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common.clip import CLIP
from common.data.packing import write_manifest, write_tar

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
    manifest: write ``manifest.json`` beside them.
    """

    def sample(shard: int, place: int) -> dict[str, bytes | str]:
        number = shard * samples + place
        entry = {"jpg": jpeg(number), "txt": f"picture number {number}".encode()}
        entry |= {name: make(number) for name, make in members.items()}
        return {"__key__": f"s{shard}-{place}"} | {name: value for name, value in entry.items() if value is not None}

    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for shard in range(shards):
        name = f"{shard:03d}.tar"
        entries[name] = write_tar(folder / name, (sample(shard, place) for place in range(samples)))
    if manifest:
        write_manifest(folder, entries, "noise")
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"

"""Noise pictures with numbered captions, for runs that only test that a recipe runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.packing import MANIFEST, write_manifest, write_tar
from common.data.shards import ShardDataModule
from common.paths import runs_directory

SHARDS, SAMPLES, CLASSES = 2, 16, 4


def jpeg(seed: int, size: int = 12) -> bytes:
    """The bytes of a JPEG: a square picture of seeded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(
    folder: Path, shards: int, samples: int, manifest: bool = False, **members: Callable[[int], bytes | None]
) -> str:
    """Write ``shards`` tar files of ``samples`` noise pictures with captions; returns their brace pattern.

    members: functions of n that give the n-th sample's bytes for an extension, also for ``jpg`` and ``txt`` (None:
        no such member). Keys are ``s<shard>-<sample>``.
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


class SmokeDataModule(ShardDataModule):
    """32 pictures of noise, each with its number for a caption and one of 4 labels; the same for every split.

    They are written to ``data/smoke`` in $EFFCLIP_RUNS on first use.

    Args:
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        global_batch_size: Pairs per batch over all devices.
        seed: Start of the loader's randomness.
        augmentation, image_views, text_view: as in ``ShardDataModule``.
    """

    def __init__(
        self,
        architecture: str,
        global_batch_size: int = 8,
        seed: int = 0,
        augmentation: str = "clip",
        image_views: Sequence[str] = (),
        text_view: str | None = None,
    ) -> None:
        folder = runs_directory() / "data" / "smoke"
        pattern = f"{folder}/{{000..{SHARDS - 1:03d}}}.tar"
        if not (folder / MANIFEST).is_file():  # written last
            write_shards(folder, SHARDS, SAMPLES, True, json=lambda n: json.dumps({"label": n % CLASSES}).encode())
        super().__init__(
            pattern,
            pattern,
            pattern,
            architecture=architecture,
            global_batch_size=global_batch_size,
            num_workers=0,
            seed=seed,
            augmentation=augmentation,
            image_views=image_views,
            text_view=text_view,
        )

    @property
    def class_prompts(self) -> list[str]:
        """The captions of the first pictures, one a class."""
        return [f"picture number {number}" for number in range(CLASSES)]

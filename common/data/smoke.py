"""Noise pictures with numbered captions: data for runs that only show that a recipe runs."""

from __future__ import annotations

import json

from common.data.packing import MANIFEST
from common.data.shards import ShardDataModule
from common.paths import runs_directory
from common.testing import write_shards

SHARDS, SAMPLES, CLASSES = 2, 16, 4


class SmokeDataModule(ShardDataModule):
    """32 pictures of noise, each with its number for a caption and one of 4 labels; the same for every split.

    They are written to ``data/smoke`` in $EFFCLIP_RUNS on first use.

    Args:
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        global_batch_size: Pairs per batch over all devices.
        seed: Start of the loader's randomness.
    """

    def __init__(self, architecture: str, global_batch_size: int = 8, seed: int = 0) -> None:
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
        )

    @property
    def class_prompts(self) -> list[str]:
        """The captions of the first pictures, one a class."""
        return [f"picture number {number}" for number in range(CLASSES)]

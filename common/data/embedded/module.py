"""The embedded benchmark: Twemoji pictures with captions, a real image-text data set that needs pip alone.

Its splits are fixed sequences of random scenes (``common.data.embedded.scenes``), drawn and packed into shards when
they are first asked for, and read by the same loader as any other shards.

Labels number the names of ``class_names("all")``: first the seen ones, then the held-out ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from random import Random

from rich.progress import track

from common.data.embedded.scenes import (
    PHRASES,
    RECIPE,
    TEMPLATES,
    VIEW,
    VIEWS,
    Scene,
    canvas_size,
    class_names,
    draw_scene,
    name_table,
    prompt,
)
from common.data.packing import Entry, write_manifest, write_tar
from common.data.shards import ShardDataModule
from common.data.transforms import Transform, center_view, random_view
from common.paths import runs_directory, written_whole

SHIFT = 3.0
"""How far the training crop moves, in pixels of a view of 48."""
SPLITS = {  # pictures, pictures per shard
    "train": (60_000, 1000),
    "val": (4000, 500),
    "test": (20_608, 500),  # 32 of each seen name
    "unseen": (4000, 500),
    "retrieval": (2000, 500),
}
ATTRIBUTION = (
    "Trained on the embedded benchmark. Its pictures are drawn from Twemoji artwork, copyright Twitter, "
    "Inc and other contributors, licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/) "
    "and changed: scaled, turned and placed on backgrounds. Names are Unicode CLDR short names (Unicode "
    "License v3)."
)
"""What the card of every model trained on these pictures must say."""


@cache
def _order(split: str, cycle: int) -> list[int]:
    labels = list(_labels(split))
    Random(f"{split}/order/{cycle}").shuffle(labels)
    return labels


def _labels(split: str) -> range:
    seen = len(class_names("seen"))
    return range(seen, len(class_names("all"))) if split == "unseen" else range(seen)


def scene(split: str, index: int) -> tuple[Scene, str]:
    """Picture ``index`` of a split and its caption; each cycle of pictures shows every name once."""
    rng = Random(f"{split}/{index}")
    labels = _labels(split)
    cycle, place = divmod(index, len(labels))
    drawn = draw_scene(rng, _order(split, cycle)[place], labels)
    mentions = [split == "retrieval" or rng.random() < RECIPE["mention"] for _ in range(4)]
    return drawn, drawn.caption(*mentions)


def indices(split: str) -> list[int]:
    """The pictures of a split; "retrieval" leaves out those whose caption an earlier one has."""
    if split not in SPLITS:
        raise ValueError(f"the embedded benchmark has the splits {list(SPLITS)}, not {split!r}")
    pictures = SPLITS[split][0]
    if split != "retrieval":
        return list(range(pictures))
    first: dict[str, int] = {}
    index = 0
    while len(first) < pictures:
        first.setdefault(scene(split, index)[1], index)
        index += 1
    return list(first.values())


def recipe_hash(view: int = VIEW) -> str:
    """Names the packed data: equal exactly when recipe, pixels of the view, splits and names are."""
    text = json.dumps([RECIPE | {"canvas": canvas_size(view)}, SPLITS, PHRASES, name_table()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sample(split: str, index: int, view: int) -> dict[str, str | bytes]:
    drawn, caption = scene(split, index)
    jpeg = io.BytesIO()
    drawn.render(view).save(jpeg, "JPEG", quality=RECIPE["quality"], subsampling=0)
    facts = json.dumps(drawn.facts())
    key = f"{split}-{index:06d}"
    return {"__key__": key, "jpg": jpeg.getvalue(), "txt": caption.encode(), "json": facts.encode()}


def _write_shard(job: tuple[str, Path, list[int], int]) -> Entry:
    split, path, pictures, view = job
    return write_tar(path, (_sample(split, index, view) for index in pictures))


def pack(split: str, root: Path | None = None, view: int = VIEW) -> Path:
    """The folder of a split's shards; a missing one is written first, complete or not at all.

    view: pixels at which the scenes are drawn, one of VIEWS.
    """
    folder = (root or runs_directory() / "data") / f"embedded-{recipe_hash(view)}" / split
    if folder.exists():
        return folder
    pictures, per_shard = indices(split), SPLITS[split][1]
    parts = [pictures[start : start + per_shard] for start in range(0, len(pictures), per_shard)]
    try:
        with written_whole(folder) as unfinished:
            unfinished.mkdir()
            jobs = [(split, unfinished / f"{number:03d}.tar", part, view) for number, part in enumerate(parts)]
            with ProcessPoolExecutor() as pool:
                entries = list(track(pool.map(_write_shard, jobs), f"packing {split} ({len(pictures)})", len(jobs)))
            shards = {job[1].name: entry for job, entry in zip(jobs, entries, strict=True)}
            write_manifest(unfinished, shards, "Twemoji, CC-BY 4.0")
    except OSError:
        if not folder.exists():  # otherwise another process was faster, and its shards are equal
            raise
    return folder


class EmbeddedDataModule(ShardDataModule):
    """The embedded benchmark's splits train, val, test, unseen and retrieval; packed when first asked for.

    Args:
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        batch_size: Pairs per batch on each device.
        num_workers: Worker processes per device; 0 reads in the training process.
        seed: Start of the loader's randomness (the stored pictures never change).
        max_damaged: Fraction of damaged samples that is tolerated.
        root: Folder for the packed shards; default: ``data`` in $EFFCLIP_RUNS.
        captions: Whether batches have captions; False saves their encoding where labels are enough.
        image_size: 48 or 96, the pixels at which the scenes are drawn and given. Default: drawn at 48 and resized
            to the architecture's size. ValueError: another size.
        train_fraction: Share of the training shards that is read, the first ones.
        augment: Whether training pictures are random views; False shows their centre, as evaluation does.
    """

    def __init__(
        self,
        architecture: str = "common/embedded_clip.json",
        batch_size: int = 128,
        num_workers: int = 1,
        seed: int = 0,
        max_damaged: float = 0.0,
        root: str | None = None,
        captions: bool = True,
        image_size: int | None = None,
        train_fraction: float = 1.0,
        augment: bool = True,
    ) -> None:
        if image_size not in (None, *VIEWS):
            raise ValueError(f"image_size {image_size}: the embedded pictures are drawn at one of {VIEWS} pixels")
        if not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction {train_fraction} is not in (0, 1]")
        super().__init__(
            architecture=architecture,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle_buffer=4000,
            max_damaged=max_damaged,
            captions=captions,
            augment=augment,
        )
        self.root, self.train_fraction = Path(root) if root else None, train_fraction
        self.view = image_size or VIEW

    def prepare_data(self) -> None:
        """Pack what the trainer is about to read."""
        task = self.trainer.state.fn.value if self.trainer else "fit"
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(task, ("test",)):
            pack(split, self.root, self.view)

    @property
    def splits(self) -> list[str]:
        """All splits; each is packed when its shards are asked for."""
        return list(SPLITS)

    def shard_urls(self, split: str) -> list[str]:
        """Paths of a split's shards, packed now where they are missing. ValueError: no such split."""
        paths = sorted(pack(split, self.root, self.view).glob("*.tar"))
        part = math.ceil(self.train_fraction * len(paths)) if split == "train" else len(paths)
        return [str(path) for path in paths[:part]]

    attribution, templates, scale = ATTRIBUTION, TEMPLATES, "embedded"

    @property
    def class_names(self) -> list[str]:
        """The seen names, in the order of the labels."""
        return class_names("seen")

    @property
    def class_prompts(self) -> list[str]:
        """The caption of each seen class, in the order of the labels: what zero-shot validation classifies by."""
        return [prompt(name) for name in class_names("seen")]

    def picture_transform(self, train: bool) -> Transform:
        """Random view of the stored canvas for training, its centre otherwise."""
        sizes = {"image_size": self.image_size, "view": self.view}
        return partial(random_view, **sizes, shift=SHIFT * self.view / VIEW) if train else partial(center_view, **sizes)

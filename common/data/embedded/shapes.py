"""Revision 2 of the embedded scenes, in which names follow from shape rather than from colours.

A picture shows one large emoji at a random place and angle, sometimes with a second, smaller one, among up to six
scraps of other emoji. Each emoji is its artwork's luminance in the shades of one random tint, brightened or darkened
by a random gamma, and inverted half of the time. Tint, background and name are independent. The caption names the
emoji and mentions, each with its own probability, its size, tint and place, the background's colour, and the second
emoji, so that retrieval and token alignment have words to align.

Names (shape_names.tsv) are CLDR short names, by this rule: the Unicode groups Food & Drink, Activities, Objects and
Symbols, whose silhouettes differ; those of revision 1 (one code point, at most 11 characters) without a word of
COLOURS, since a tint would contradict it. Every third in Unicode's order is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageOps

from common.data.embedded import twemoji
from common.data.embedded.twemoji import (
    CANVAS,
    COLOURS,
    VIEW,
    NameList,
    attribution,
    background,
    describe,
    draw_background,
    draw_position,
    first_apart,
    place_name,
    size_name,
)

VIEWS = (24, 48, 96)
"""Pixels at which a view is drawn: as the recipe says it, twice that, all that artwork of 72 pixels can fill, or half.
"""
RECIPE = {
    "revision": 2,  # counts changes of the code below that change pictures
    "canvas": CANVAS,
    "colours": COLOURS,
    "grid": 4,  # random background colours each way
    "contrast": 24,  # their greatest distance from the named colour, per channel
    "gamma": (0.6, 1.6),  # of the luminance
    "shades": (0.1, 0.9),  # darkest: this share of the tint; lightest: this share of the way from the tint to white
    "scale": (0.50, 0.95),  # of the view
    "crowded_scale": (0.50, 0.75),  # with a second emoji
    "medium": 0.62,
    "large": 0.76,
    "middle": (0.4, 0.6),  # of the view; a centre before or behind that is "left" or "right", "top" or "bottom"
    "degrees": 20,
    "second": 0.3,
    "second_scale": (0.45, 0.60),  # of the first emoji
    "overhang": 0.1,  # of the emoji, beyond the view
    "scraps": 6,  # at most
    "scrap_part": 36,  # pixels a side of the artwork that a scrap shows
    "scrap_scale": (0.15, 0.35),  # of the view
    "front": 1 / 3,  # of the scraps lie in front
    "hidden": 0.2,  # at most, of the first emoji's area, by scraps in front
    "mention": 0.6,  # of each fact
    "quality": 95,
}
ATTRIBUTION = attribution("recoloured, scaled, turned, cut and placed on backgrounds")
_NAMES = NameList("shape_names.tsv")
name_table, class_names, vocabulary = _NAMES.table, _NAMES.names, _NAMES.vocabulary


@dataclass(frozen=True)
class Look:
    """How an emoji's luminance becomes colours: the tint's name, the gamma, and whether dark and light change places.

    For a luminance l in [0,1], t = l^gamma, or 1 - l^gamma where inverted; the colour goes linearly from the tint's
    darkest shade (t = 0) over the tint itself (t = 1/2) to its lightest shade (t = 1).
    """

    tint: str
    gamma: float
    inverted: bool

    def paint(self, luminance: Image.Image) -> Image.Image:
        """A luminance picture in shades of the tint, RGB."""
        level = _LUMINANCES**self.gamma
        level = 1 - level if self.inverted else level
        luminance.putpalette(_shades(self.tint)[(255 * level).round().astype(np.uint8)].tobytes())
        return luminance.convert("RGB")


_LUMINANCES = np.linspace(0, 1, 256)


@cache
def _shades(tint: str) -> np.ndarray:
    """The shades of a tint from the darkest to the lightest, uint8 [256,3]."""
    dark, light = RECIPE["shades"]
    steps = [np.interp(_LUMINANCES, (0, 0.5, 1), (dark * c, c, c + light * (255 - c))) for c in COLOURS[tint]]
    return np.stack(steps, 1).round().astype(np.uint8)


@dataclass(frozen=True)
class Emoji(twemoji.Emoji):
    """One drawn emoji: its label, width, centre (pixels of the view), angle (degrees) and look.

    corner: left and top of the part of the artwork that a scrap shows; None shows all of it.
    """

    look: Look
    corner: tuple[int, int] | None = None

    def draw_on(self, canvas: Image.Image, zoom: int) -> None:
        """Draw it on the stored picture of a view of ``zoom`` x VIEW pixels."""
        shape = _artwork(self.label)
        if self.corner:
            left, top = self.corner
            shape = shape.crop((left, top, left + RECIPE["scrap_part"], top + RECIPE["scrap_part"]))
        drawn, place = self.transformed(shape, zoom)
        luminance, mask = drawn.split()
        canvas.paste(self.look.paint(luminance), place, mask)


@dataclass(frozen=True)
class Scene:
    """All that a picture shows: a background colour's name, its shades, one emoji, perhaps a second, and scraps.

    behind, front: the scraps behind both emoji, and those in front of them.
    """

    colour: str
    grid: bytes
    main: Emoji
    second: Emoji | None = None
    behind: tuple[Emoji, ...] = ()
    front: tuple[Emoji, ...] = ()

    @property
    def place(self) -> str:
        """Where the centre lies, down and across."""
        return place_name(self.main, RECIPE["middle"])

    @property
    def size(self) -> str:
        """The size word."""
        return size_name(self.main, RECIPE)

    def facts(self) -> dict[str, str | int | None]:
        """What the shard's json says: all facts, mentioned in the caption or not."""
        names = class_names("all")
        return {
            "label": self.main.label,
            "name": names[self.main.label],
            "tint": self.main.look.tint,
            "colour": self.colour,
            "place": self.place,
            "size": self.size,
            "second": names[self.second.label] if self.second else None,
            "second_label": self.second.label if self.second else None,
            "second_tint": self.second.look.tint if self.second else None,
        }

    def caption(
        self, size: bool = True, tint: bool = True, place: bool = True, colour: bool = True, second: bool = True
    ) -> str:
        """The name with those facts that are asked for."""
        facts = self.facts()
        noun = " ".join([facts["size"]] * size + [facts["tint"]] * tint + [facts["name"]])
        other = f"{facts['second_tint']} {facts['second']}" if second and self.second else None
        return describe(noun, facts["place"] if place else None, self.colour if colour else None, other)

    def render(self, view: int = VIEW) -> Image.Image:
        """The stored picture of a view of so many pixels, RGB: CANVAS x CANVAS at 48, twice that at 96.

        At 24 it is half of that: the means of 2 x 2 pixels, which are the Haar transform's low band.
        """
        if view < VIEW:
            return self.render().reduce(VIEW // view)
        canvas = background(self.grid, view, RECIPE)
        for emoji in filter(None, (*self.behind, self.second, self.main, *self.front)):
            emoji.draw_on(canvas, view // VIEW)
        return canvas


@cache
def _artwork(label: int) -> Image.Image:
    """Luminance, stretched to the full range unless it is flat, and mask of an emoji: mode LA."""
    luminance, mask = twemoji.artwork(name_table()[label][0]).convert("LA").split()
    opaque = mask.point(lambda value: 255 * (value > 128))
    return Image.merge("LA", [ImageOps.autocontrast(luminance, cutoff=1, mask=opaque), mask])


@cache
def _coverage(label: int) -> float:
    """The share of the artwork's square that the emoji covers."""
    return np.asarray(_artwork(label).getchannel("A")).mean() / 255


def _draw_look(rng: Random) -> Look:
    return Look(rng.choice(list(COLOURS)), rng.uniform(*RECIPE["gamma"]), rng.random() < 0.5)


def _draw_emoji(rng: Random, label: int, size: float, look: Look) -> Emoji:
    return Emoji(label, size, *draw_position(rng, size, RECIPE), look)


def _draw_scrap(rng: Random, label: int, size: float, x: float, y: float) -> Emoji:
    room = _artwork(label).width - RECIPE["scrap_part"]
    corner = rng.randint(0, room), rng.randint(0, room)
    return Emoji(label, size, x, y, rng.uniform(0, 360), _draw_look(rng), corner)


def _draw_second(rng: Random, main: Emoji, labels: Sequence[int]) -> Emoji:
    size, look = main.size * rng.uniform(*RECIPE["second_scale"]), _draw_look(rng)
    label = rng.choice(labels)
    return first_apart(main, [_draw_emoji(rng, label, size, look) for _ in range(12)])


def _draw_scraps(rng: Random, main: Emoji, labels: Sequence[int]) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...]]:
    """Scraps behind the emoji, and scraps in front of it, which together hide no more of it than the recipe allows."""
    behind, front = [], []
    smallest, largest = (VIEW * scale for scale in RECIPE["scrap_scale"])
    coverable = RECIPE["hidden"] * _coverage(main.label) * main.size**2
    for _ in range(rng.randint(0, RECIPE["scraps"])):
        size = rng.uniform(smallest, largest)
        if rng.random() < RECIPE["front"] and coverable >= smallest**2:
            size = min(size, coverable**0.5)
            coverable -= size**2
            x, y = (c + main.size * rng.uniform(-0.5, 0.5) for c in (main.x, main.y))
            front.append(_draw_scrap(rng, rng.choice(labels), size, x, y))
        else:
            behind.append(_draw_scrap(rng, rng.choice(labels), size, rng.uniform(0, VIEW), rng.uniform(0, VIEW)))
    return tuple(behind), tuple(front)


def draw_scene(rng: Random, label: int, others: Sequence[int]) -> Scene:
    """A random scene with the emoji ``label``; a second emoji and scraps are of the other labels in ``others``."""
    labels = [other for other in others if other != label]
    colour, grid = draw_background(rng, RECIPE)
    crowded = rng.random() < RECIPE["second"]
    scale = RECIPE["crowded_scale" if crowded else "scale"]
    main = _draw_emoji(rng, label, VIEW * rng.uniform(*scale), _draw_look(rng))
    second = _draw_second(rng, main, labels) if crowded else None
    return Scene(colour, grid, main, second, *_draw_scraps(rng, main, labels))


def draw_mentions(rng: Random) -> list[bool]:
    """Which facts a caption mentions: the arguments of ``Scene.caption``."""
    return [rng.random() < RECIPE["mention"] for _ in range(5)]

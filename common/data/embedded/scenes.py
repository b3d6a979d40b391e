"""Revision 1 of the embedded scenes: their names, what they show, what their captions say, how they are drawn.

A picture shows one emoji at a random size, place and angle on a smooth random background, sometimes with a
second, smaller one. Its caption names the emoji and, each with its own probability, the background's
colour, the place, the size and the second emoji, so that retrieval and token alignment have words to align.
Names are CLDR short names of at most 11 characters (names.tsv): every such emoji of one code point that
Twemoji draws, hence no country flags, keycaps, skin tones or joined sequences.

The emoji keep their own colours, from which most names follow; revision 2 (``shapes``) takes the colours away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from common.data.embedded.twemoji import (
    CANVAS,
    COLOURS,
    VIEW,
    Emoji,
    NameList,
    artwork,
    attribution,
    background,
    describe,
    draw_background,
    draw_position,
    first_apart,
    place_name,
    size_name,
)

VIEWS = (48, 96)
"""Pixels at which a view is drawn: as the recipe says it or twice that, all that artwork of 72 pixels can fill."""
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
ATTRIBUTION = attribution("scaled, turned and placed on backgrounds")
_NAMES = NameList("names.tsv")
name_table, class_names, vocabulary = _NAMES.table, _NAMES.names, _NAMES.vocabulary


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
        return place_name(self.main, (1 / 3, 2 / 3))

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
            "colour": self.colour,
            "place": self.place,
            "size": self.size,
            "second": names[self.second.label] if self.second else None,
            "second_label": self.second.label if self.second else None,
        }

    def caption(self, size: bool = True, place: bool = True, colour: bool = True, second: bool = True) -> str:
        """The name with those facts that are asked for."""
        facts = self.facts()
        noun = f"{facts['size']} {facts['name']}" if size else facts["name"]
        return describe(
            noun,
            facts["place"] if place else None,
            self.colour if colour else None,
            facts["second"] if second else None,
        )

    def render(self, view: int = VIEW) -> Image.Image:
        """The stored picture of a view of so many pixels, RGB: CANVAS x CANVAS at 48, twice that at 96."""
        canvas = background(self.grid, view, RECIPE)
        for emoji in filter(None, (self.second, self.main)):
            drawn, corner = emoji.transformed(_artwork(emoji.label), view // VIEW)
            canvas.paste(drawn, corner, drawn)
        return canvas


def _artwork(label: int) -> Image.Image:
    return artwork(name_table()[label][0])


def _draw_emoji(rng: Random, label: int, size: float) -> Emoji:
    return Emoji(label, size, *draw_position(rng, size, RECIPE))


def draw_scene(rng: Random, label: int, others: Sequence[int]) -> Scene:
    """A random scene with the emoji ``label``; a second emoji is one of the labels ``others``."""
    colour, grid = draw_background(rng, RECIPE)
    crowded = rng.random() < RECIPE["second"]
    scale = RECIPE["crowded_scale" if crowded else "scale"]
    main = _draw_emoji(rng, label, VIEW * rng.uniform(*scale))
    if not crowded:
        return Scene(colour, grid, main, None)
    other = rng.choice([candidate for candidate in others if candidate != label])
    size = main.size * rng.uniform(*RECIPE["second_scale"])
    return Scene(colour, grid, main, first_apart(main, [_draw_emoji(rng, other, size) for _ in range(12)]))


def draw_mentions(rng: Random) -> list[bool]:
    """Which facts a caption mentions: the arguments of ``Scene.caption``."""
    return [rng.random() < RECIPE["mention"] for _ in range(4)]

"""Revision 3 of the embedded scenes, in which classes differ by texture alone.

A picture shows one emoji's silhouette at a random place, size and angle on a smooth background, filled with one of the
textures below. Class, silhouette, tint, background and the texture's period, angle and phase are independent. The fill
takes its shades by rank, so that its histogram is the same for every texture: neither outline nor colours tell the
class, and a model must see how light and dark alternate. JPEG keeps that at its highest quality; the crop leaves a
trace at most, which the reference ladder measures. The caption names the texture and mentions, each with its own
probability, size, tint and place, and the background's colour.

Shapes: u, v [H,W], the pixels' coordinates in periods of the texture, rightwards and downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from common.data.embedded import shapes, twemoji
from common.data.embedded.shapes import Look
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
    place_name,
    size_name,
)

VIEWS = (48, 96)
"""Pixels at which a view is drawn: as the recipe says it, or twice that."""
RECIPE = {
    "revision": 1,  # counts changes of the code below that change pictures
    "canvas": CANVAS,
    "colours": COLOURS,
    "grid": 4,  # random background colours each way
    "contrast": 24,  # their greatest distance from the named colour, per channel
    "gamma": (0.6, 1.6),  # of the level
    "shades": shapes.RECIPE["shades"],
    "scale": (0.65, 0.95),  # of the view
    "medium": 0.75,
    "large": 0.85,
    "middle": (0.4, 0.6),  # of the view
    "degrees": 20,  # of the silhouette
    "overhang": 0.05,  # of the silhouette, beyond the view
    "coverage": 0.45,  # at least, of its square by the silhouette
    "period": (6.0, 9.0),  # of the texture, pixels of a view of 48
    "turn": 6.0,  # of the texture, degrees either way
    "edge": 0.25,  # of the fill, in the shades between the darkest and the lightest
    "mention": 0.6,  # of each fact
    "quality": 100,  # at 95 the rounding spreads the shades, by the texture
}
ATTRIBUTION = attribution("cut to their silhouettes, filled with drawn textures and placed on backgrounds")
_NAMES = NameList("texture_names.tsv")
name_table, class_names, vocabulary = _NAMES.table, _NAMES.names, _NAMES.vocabulary
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(u, v) -> the texture's level; only its order counts, as shades go by rank."""


def _off(x: np.ndarray) -> np.ndarray:
    """The distance from the nearest whole number and a half, [0, 1/2]: a triangular wave of period 1."""
    return np.abs(x - np.floor(x) - 0.5)


def _plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(3 * a, b), np.maximum(a, 3 * b))


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_off(v), 2 * _off(u / 2 + np.floor(v) / 2) - 0.25)


def _woven(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    across = (np.floor(u / 1.5) + np.floor(v / 1.5)) % 2 > 0
    return np.where(across, _off(2 * u), _off(2 * v))


_DIAGONAL = 2**-0.5
TEXTURES: dict[str, Field] = {
    "level": lambda u, v: _off(v),
    "upright": lambda u, v: _off(u),
    "rising": lambda u, v: _off(_DIAGONAL * (u + v)),
    "falling": lambda u, v: _off(_DIAGONAL * (u - v)),
    "checks": lambda u, v: np.sin(np.pi * u) * np.sin(np.pi * v),
    "diamonds": lambda u, v: np.cos(2 * np.pi * u / 2**0.5) + np.cos(2 * np.pi * v / 2**0.5),
    "dots": lambda u, v: np.hypot(_off(u), _off(v)),
    "staggered": lambda u, v: np.minimum(
        np.hypot(_off(u), 1.7 * _off(v / 1.7)), np.hypot(_off(u + 0.5), 1.7 * _off(v / 1.7 + 0.5))
    ),
    "squares": lambda u, v: np.maximum(_off(u), _off(v)),
    "crosses": lambda u, v: _plus(_off(u), _off(v)),
    "triangles": lambda u, v: v - np.floor(v) - 2 * _off(u),
    "bricks": _bricks,
    "woven": _woven,
    "waves": lambda u, v: _off(v + 0.35 * np.sin(np.pi * u)),
    "zigzags": lambda u, v: _off(v + 2 * _off(u / 2)),
    "rings": lambda u, v: _off(np.hypot(u, v)),
    "rays": lambda u, v: np.cos(9 * np.arctan2(v, u)),
    "spiral": lambda u, v: _off(np.hypot(u, v) + np.arctan2(v, u) / (2 * np.pi)),
    "ripples": lambda u, v: _off(np.hypot(u + 2, v)) + _off(np.hypot(u - 2, v)),
    "blotches": lambda u, v: sum(
        np.cos(2 * np.pi * _DIAGONAL * (u * np.cos(k) + v * np.sin(k)) + 7 * k * k) for k in range(1, 8)
    ),
}
"""The textures by the codes of texture_names.tsv. No two are each other's inverse, since light and dark may change."""


@dataclass(frozen=True)
class Fill:
    """How a texture lies on the view: period and the place of its origin in pixels of the view, angle in degrees."""

    texture: str
    period: float
    x: float
    y: float
    angle: float

    def levels(self, mask: np.ndarray, left: float, top: float, zoom: int) -> np.ndarray:
        """Levels of the pixels of a silhouette, uint8 [H,W]; each silhouette of so many pixels has the same histogram.

        mask: bool [H,W], the silhouette.  left, top: where it begins on the view.  zoom: its pixels a pixel of VIEW.
        """
        down, across = ((np.arange(size) + 0.5) / zoom for size in mask.shape)
        x, y = np.meshgrid(across + left - self.x, down + top - self.y)
        turn = np.deg2rad(self.angle)
        u, v = ((x * np.cos(turn) + y * np.sin(turn)), (y * np.cos(turn) - x * np.sin(turn)))
        inside = TEXTURES[self.texture](u / self.period, v / self.period)[mask]
        ranks = np.empty(len(inside))
        ranks[np.argsort(inside, kind="stable")] = (np.arange(len(inside)) + 0.5) / max(1, len(inside))
        levels = np.zeros(mask.shape, np.uint8)
        levels[mask] = (255 * np.clip((ranks - 0.5) / RECIPE["edge"] + 0.5, 0, 1)).round()
        return levels


@dataclass(frozen=True)
class Scene:
    """All that a picture shows: a background colour's name, its shades, a silhouette, its fill and look.

    label: the texture's.  shape: the silhouette; its label is a place in the names of revision 2.
    """

    label: int
    colour: str
    grid: bytes
    shape: twemoji.Emoji
    fill: Fill
    look: Look

    @property
    def place(self) -> str:
        """Where the centre lies, down and across."""
        return place_name(self.shape, RECIPE["middle"])

    @property
    def size(self) -> str:
        """The size word."""
        return size_name(self.shape, RECIPE)

    def facts(self) -> dict[str, str | int]:
        """What the shard's json says: all facts, mentioned in the caption or not."""
        return {
            "label": self.label,
            "name": class_names("all")[self.label],
            "silhouette": shapes.class_names("all")[self.shape.label],
            "tint": self.look.tint,
            "colour": self.colour,
            "place": self.place,
            "size": self.size,
        }

    def caption(self, size: bool = True, tint: bool = True, place: bool = True, colour: bool = True) -> str:
        """The name with those facts that are asked for; the silhouette is never named."""
        facts = self.facts()
        noun = " ".join([facts["size"]] * size + [facts["tint"]] * tint + [facts["name"]])
        return describe(noun, self.place if place else None, self.colour if colour else None, None)

    def render(self, view: int = VIEW) -> Image.Image:
        """The stored picture of a view of so many pixels, RGB: CANVAS x CANVAS at 48, twice that at 96."""
        zoom, canvas = view // VIEW, background(self.grid, view, RECIPE)
        mask, corner = self.shape.transformed(_silhouette(self.shape.label), zoom)
        left, top = (c / zoom - (CANVAS - VIEW) / 2 for c in corner)
        levels = self.fill.levels(np.asarray(mask) > 0, left, top, zoom)
        canvas.paste(self.look.paint(Image.fromarray(levels)), corner, mask)
        return canvas


def _silhouette(label: int) -> Image.Image:
    return twemoji.artwork(shapes.name_table()[label][0]).getchannel("A")


@cache
def silhouettes() -> list[int]:
    """Those of revision 2's labels whose silhouettes have room for a texture."""
    shares = (np.asarray(_silhouette(label)).mean() / 255 for label in range(len(shapes.name_table())))
    return [label for label, share in enumerate(shares) if share >= RECIPE["coverage"]]


def draw_scene(rng: Random, label: int, others: Sequence[int] = ()) -> Scene:
    """A random scene with the texture ``label``. others: the other labels; a scene shows one texture alone."""
    colour, grid = draw_background(rng, RECIPE)
    size = VIEW * rng.uniform(*RECIPE["scale"])
    shape = twemoji.Emoji(rng.choice(silhouettes()), size, *draw_position(rng, size, RECIPE))
    period, turn = rng.uniform(*RECIPE["period"]), rng.uniform(-RECIPE["turn"], RECIPE["turn"])
    x, y = (c + period * rng.uniform(-0.5, 0.5) for c in (shape.x, shape.y))
    look = Look(rng.choice(list(COLOURS)), rng.uniform(*RECIPE["gamma"]), rng.random() < 0.5)
    return Scene(label, colour, grid, shape, Fill(name_table()[label][0], period, x, y, turn), look)


def draw_mentions(rng: Random) -> list[bool]:
    """Which facts a caption mentions: the arguments of ``Scene.caption``."""
    return [rng.random() < RECIPE["mention"] for _ in range(4)]

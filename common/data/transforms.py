"""Pictures -> uint8 arrays -> normalised tensors; all randomness comes from the generator argument.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.data.prepared import resized, to_rgb
from common.preprocess import Preprocess

Transform = Callable[[Image.Image, Random], np.ndarray]


def eval_transform(preprocess: Preprocess) -> Transform:
    """open_clip's evaluation transform; ``to_batch`` normalises what it returns.

    The transform maps (image, rng) to uint8 [H,W,3]; it does not use rng.
    """
    return partial(_prepare, preprocess=preprocess)


def views_transform(preprocesses: Sequence[Preprocess]) -> Callable[[Image.Image, Random], list[np.ndarray]]:
    """The evaluation transform for several models, of which each has its preprocessing in the list.

    The transform maps (image, rng) to one uint8 [H,W,3] for each model; models that prepare alike get one array.
    """
    return partial(_views, preprocesses=tuple(preprocesses))


def train_transform(image_size: int, scale: tuple[float, float] = (0.9, 1.0), flip: bool = False) -> Transform:
    """open_clip's training transform: resize a random box with ``scale`` of the area to a square (bicubic).

    flip: mirror with probability 1/2.
    The transform maps (image, rng) to uint8 [H,W,3].
    ValueError: ``scale`` is not an increasing pair within (0, 1].
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale {scale} must be an increasing pair within (0, 1], for instance (0.9, 1.0)")
    return partial(_crop_and_resize, image_size=image_size, scale=scale, flip=flip)


# Transforms are partial objects rather than closures because "spawn" pickles them for workers.
def _prepare(image: Image.Image, rng: Random, preprocess: Preprocess) -> np.ndarray:
    how = preprocess
    return resized(image, how.size, how.interpolation, how.resize_mode, how.fill_color)


def _views(image: Image.Image, rng: Random, preprocesses: Sequence[Preprocess]) -> list[np.ndarray]:
    made = {how: _prepare(image, rng, how) for how in set(preprocesses)}
    return [made[how] for how in preprocesses]


def _crop_and_resize(
    image: Image.Image, rng: Random, image_size: int, scale: tuple[float, float], flip: bool
) -> np.ndarray:
    image = to_rgb(image)
    box = random_box(*image.size, scale, rng)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(ImageOps.mirror(image) if flip and rng.random() < 0.5 else image)


def random_box(width: int, height: int, scale: tuple[float, float], rng: Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a box: its area's share in ``scale``, width:height in [3/4, 4/3].

    After ten failed draws the box is the central part with the nearest aspect ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_view(image: Image.Image, rng: Random, *, image_size: int, view: int) -> np.ndarray:
    """The central ``view`` x ``view`` pixels of a picture, at ``image_size``: uint8 [H,W,3]."""
    left, top = (image.width - view) / 2, (image.height - view) / 2
    box = (left, top, left + view, top + view)
    return np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))


def random_view(
    image: Image.Image,
    rng: Random,
    *,
    image_size: int,
    view: int,
    degrees: float = 10.0,
    scale: tuple[float, float] = (0.9, 1.1),
    shift: float = 3.0,
) -> np.ndarray:
    """The central view turned by up to ``degrees``, enlarged by ``scale``, moved by up to ``shift`` pixels.

    Crop, rotation, scale and shift are one affine map, so that the picture is interpolated once; ``shift``
    is in pixels of the given picture. Pixels beyond the border take the colour of the
    corner. Returns uint8 [H,W,3].
    """
    image = image.convert("RGB")
    angle = math.radians(rng.uniform(-degrees, degrees))
    step = view / image_size / rng.uniform(*scale)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    x0 = image.width / 2 + rng.uniform(-shift, shift) - (cos - sin) * image_size / 2
    y0 = image.height / 2 + rng.uniform(-shift, shift) - (sin + cos) * image_size / 2
    turned = image.transform(
        (image_size, image_size),
        Image.Transform.AFFINE,
        (cos, -sin, x0, sin, cos, y0),
        Image.Resampling.BILINEAR,
        fillcolor=image.getpixel((0, 0)),
    )
    return np.asarray(turned)


def to_batch(pictures: Sequence[np.ndarray], preprocess: Preprocess) -> Tensor:
    """uint8 [H,W,3] each -> float [B,3,H,W], normalised by mean and deviation; one conversion for the whole batch."""
    pixels = (
        torch.from_numpy(np.stack(pictures))
        .permute(0, 3, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return pixels.div_(255).sub_(mean).div_(std)  # in torchvision's order, so that every bit is equal

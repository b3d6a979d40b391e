"""Named ways to draw a training picture, each with its source, and ways to draw a caption.

Shapes: H height, W width.

All randomness comes from the generator argument. Pictures use PIL alone, and each step equals torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from common.data.transforms import Transform, train_transform

Rewrite = Callable[[str, Random], str]
"""(caption, random numbers) -> another caption of the same picture."""


@dataclass(frozen=True)
class Augmentation:
    """How a training picture is drawn.

    scale: least and greatest share of the area that the cropped box has.
    flip: mirror with probability 1/2.
    distort: colours, grey and blur as MoCo v2 draws them, see ``distorted``.
    blur, solarise: probabilities of these two distortions.
    """

    scale: tuple[float, float]
    flip: bool = False
    distort: bool = False
    blur: float = 0.5
    solarise: float = 0.0

    def transform(self, image_size: int) -> Transform:
        """(PIL image, Random) -> uint8 [H,W,3]. ValueError: ``scale`` is no increasing pair within (0, 1]."""
        if not self.distort:
            return train_transform(image_size, self.scale, self.flip)
        drawn = partial(distorted, blur=self.blur, solarise=self.solarise)
        return partial(_distort, crop=train_transform(image_size, self.scale), drawn=drawn, flip=self.flip)


AUGMENTATIONS = {
    "clip": Augmentation((0.9, 1.0)),
    "slip": Augmentation((0.5, 1.0)),
    "mocov2": Augmentation((0.2, 1.0), flip=True, distort=True),
    "aclip": Augmentation((0.5, 1.0), distort=True, blur=0.1, solarise=0.2),
}
"""clip: open_clip's. slip: SLIP's for the picture beside a caption (Mu et al., 2021), which Cui et al. (2022) also give
CLIP. mocov2: MoCo v2's (Chen et al., 2020), which Cui et al. give the views of SLIP and DeCLIP. SLIP's own views have
the scale (0.08, 1). aclip: A-CLIP's for its views (Yang et al., 2023), where saturation changes half as much."""


def augmentation(name: str, scale: tuple[float, float] | None = None, flip: bool | None = None) -> Augmentation:
    """The augmentation of a name, with another ``scale`` or ``flip`` where one is given. ValueError: no such name."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation {name!r} is none of {', '.join(AUGMENTATIONS)}")
    changes = {"scale": scale and tuple(scale), "flip": flip}
    return replace(AUGMENTATIONS[name], **{key: value for key, value in changes.items() if value is not None})


def after(first: Transform, then: Transform) -> Transform:
    """The transform that applies ``then`` to what ``first`` gives."""
    return partial(_after, first=first, then=then)


def sometimes_grey(image: Image.Image, rng: Random, *, share: float) -> np.ndarray:
    """The picture, in grey with probability ``share``: uint8 [H,W,3]."""
    return np.asarray(_in_grey(image) if rng.random() < share else image)


def distorted(picture: Image.Image, rng: Random, blur: float = 0.5, solarise: float = 0.0) -> Image.Image:
    """MoCo v2's distortions of an RGB picture: colour jitter (probability .8), grey (.2), Gaussian blur (``blur``).

    The jitter changes brightness, contrast and saturation by up to 40 % and the hue by up to a tenth of the circle, in
    random order. The blur's deviation is .1 to 2 pixels. With probability ``solarise`` the bright half of all values is
    inverted.
    """
    if rng.random() < 0.8:
        picture = jittered(picture, rng)
    if rng.random() < 0.2:
        picture = _in_grey(picture)
    if rng.random() < blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if solarise and rng.random() < solarise:
        picture = ImageOps.solarize(picture)
    return picture


def jittered(picture: Image.Image, rng: Random, strength: float = 0.4, hue: float = 0.1) -> Image.Image:
    """Brightness, contrast and saturation times a factor within 1 ± ``strength``, the hue turned by up to ``hue``."""
    steps: list[Callable[[Image.Image], Image.Image]] = [
        partial(enhanced, kind=kind, factor=rng.uniform(1 - strength, 1 + strength))
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    ]
    steps.append(partial(turned_hue, turn=rng.uniform(-hue, hue)))
    rng.shuffle(steps)
    for step in steps:
        picture = step(picture)
    return picture


def enhanced(picture: Image.Image, kind: type, factor: float) -> Image.Image:
    """The picture with one of PIL's ``ImageEnhance`` qualities times ``factor``."""
    return kind(picture).enhance(factor)


def turned_hue(picture: Image.Image, turn: float) -> Image.Image:
    """The picture with its hues turned by ``turn`` of the whole circle."""
    hue, saturation, value = picture.convert("HSV").split()
    shifted = np.asarray(hue) + np.int32(turn * 255).astype(np.uint8)  # wraps around, as the circle does
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def swapped_or_shortened(caption: str, rng: Random) -> str:
    """The caption with two words exchanged, or with about a tenth of its words left out, by equal chance.

    These are two of the three changes of EDA (Wei and Zou, 2019) that DeCLIP draws from. The third takes synonyms from
    WordNet, which this suite does not bring along.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    if rng.random() < 0.5:
        first, second = rng.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
        return " ".join(words)
    return " ".join([word for word in words if rng.random() > 0.1] or [rng.choice(words)])


REWRITES: dict[str, Rewrite] = {"eda": swapped_or_shortened}
"""Ways to rewrite a caption, by name."""


def rewrite(name: str) -> Rewrite:
    """The way of a name. ValueError: no such name."""
    if name not in REWRITES:
        raise ValueError(f"text_view {name!r} is none of {', '.join(REWRITES)}")
    return REWRITES[name]


def _distort(
    image: Image.Image, rng: Random, crop: Transform, drawn: Callable[[Image.Image, Random], Image.Image], flip: bool
) -> np.ndarray:
    picture = drawn(Image.fromarray(crop(image, rng)), rng)
    return np.asarray(ImageOps.mirror(picture) if flip and rng.random() < 0.5 else picture)


def _in_grey(picture: Image.Image) -> Image.Image:
    return ImageOps.grayscale(picture).convert("RGB")


def _after(image: Image.Image, rng: Random, first: Transform, then: Transform) -> np.ndarray:
    return then(Image.fromarray(first(image, rng)), rng)

"""Towers that tests share: one with a keep rate, large ones without drawn weights, directories of tiny models."""

import torch

from common import directory
from common.clip import CLIP
from common.reduction import ReducedTower
from waveclip import WaveTower


class AttendedTower(ReducedTower):
    """Keeps the patch tokens that the class token attends to most in the second block."""

    prunable = True

    def __init__(self, tower, keep):
        count = max(1, round(keep * tower.grid**2))

        def reduce(x, context):
            return context.select(x, context.class_attention().topk(count).indices.sort(-1).values)

        super().__init__(tower, {1: reduce} if keep < 1 else {})
        self.keep = keep

    def at(self, keep):
        return AttendedTower(self.tower, keep)


def pictures(count, size=32, seed=0):
    """Normalised noise [count,3,size,size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


NAMES = ["red cat", "green dog", "blue bird"]
"""Classes that the tiny CLIP's vocabulary can spell."""


def undrawn(build):
    """What ``build`` builds, with weights of no meaning: drawing random ones takes longer than to count it."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu").eval()


def tiny_directory(folder, levels=1):
    """A model directory: a random tiny WaveCLIP of ``levels``, or the tiny CLIP itself for 0."""
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    if levels == 0:
        directory.write(folder, clip, None, NAMES, ["{a} {}"])
    else:
        wave = WaveTower.from_image_tower(clip.image_tower, levels).eval()
        directory.write(folder, wave, clip, NAMES, ["{a} {}"])
    return folder


_HOW = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
"""How the small model's pictures are prepared: in all ways otherwise than CLIP's."""


def small_directory(folder, seed=1, templates=("{a} {}",), **architecture):
    """A model directory of a CLIP of one block, for pictures of 16 px, in a joint space of its own."""
    tiny = CLIP.tiny().architecture
    vision = {**tiny["vision_cfg"], "image_size": 16, "layers": 1}
    torch.manual_seed(seed)
    clip = CLIP({**tiny, "embed_dim": 24, "vision_cfg": vision, "preprocess_cfg": _HOW, **architecture}).eval()
    directory.write(folder, clip, None, NAMES, list(templates))
    return str(folder)

"""Data of the report page's slider: a one-level WaveCLIP at every threshold, its margins, and example images.

Shapes: M images, S image size.

The numbers are of one training seed's stored answers; only the examples are asked anew.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.embedded import PART, REVISION, batches, prompts
from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.saving import Exits
from common.adaptive import Levels
from common.clip import CLIP
from common.data.embedded.module import scenes_of
from common.early_exit import NEVER
from common.preprocess import MEAN, STD
from common.zeroshot import embed_prompts
from waveclip import WaveTower

STEPS, BINS, EXAMPLES = 200, 50, 24


def sweep(exits: Exits, costs: Sequence[Cost]) -> dict[str, list[float]]:
    """Operating points at thresholds 0, 1/200, ..., 1, and at one that no margin reaches.

    ``refined`` and ``right`` count images; ``gmacs`` is the mean. costs: of an exit at the coarse and the fine level.
    """
    points: dict[str, list[float]] = {"threshold": [], "refined": [], "right": [], "gmacs": []}
    for threshold in [*(step / STEPS for step in range(STEPS + 1)), NEVER]:
        correct, late = exits.steps().at(threshold)
        refined = float(late.mean())
        points["threshold"].append(threshold)
        points["refined"].append(int(late.sum()))
        points["right"].append(int(correct.sum()))
        points["gmacs"].append(expected(costs, [1 - refined, refined]).macs.gmacs)
    return points


def margins(exits: Exits) -> dict[str, list[int]]:
    """Histograms of the coarse margin over [0, 1], by which of the two levels are right: both, one or none."""
    coarse, fine = exits.first, exits.second
    groups = {"both": coarse & fine, "fine alone": fine & ~coarse, "coarse alone": coarse & ~fine}
    groups["neither"] = ~coarse & ~fine
    return {name: np.histogram(exits.confidence[group], BINS, (0, 1))[0].tolist() for name, group in groups.items()}


@torch.no_grad()
def examples(teacher: CLIP, student: WaveTower, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Some of the first 500 test images, spread evenly over the order of their coarse margins, the surest first.

    Each has its name, both levels' guesses, its margin, and the pixels that the model saw as a data URI.
    """
    names = scenes_of(REVISION).class_names("seen")
    shown = list(batches("test", PART))
    images, labels = (torch.cat([batch[key] for batch in shown]) for key in ("image", "label"))
    classes, scale = embed_prompts(teacher, prompts()), teacher.logit_scale.exp()
    (coarse, fine), (margin,) = Levels(student).probabilities_of_all_paths(images, classes, scale)
    places = torch.linspace(0, len(margin) - 1, count).round().long()
    return [
        {
            "name": names[labels[place]],
            "guesses": [names[level[place].argmax()] for level in (coarse, fine)],
            "margin": margin[place].item(),
            "image": data_uri(images[place]),
        }
        for place in margin.argsort(descending=True)[places].tolist()
    ]


def data_uri(image: Tensor) -> str:
    """image [3,S,S], normalised as CLIP's -> its pixels as WebP in a data URI."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (255 * (image.cpu() * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()

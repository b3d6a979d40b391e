"""Data of the report page's slider: a one-level WaveCLIP at every threshold, its margins, and example images.

Shapes: M images, S image size.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.embedded import PART, REVISION, batches, prompts
from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.observed import Observed, predictions
from common.clip import CLIP
from common.data.embedded.module import scenes_of
from common.early_exit import NEVER
from common.preprocess import MEAN, STD
from waveclip import MarginGate, WaveTower

STEPS, BINS, EXAMPLES = 200, 50, 24


def sweep(answers: Observed, costs: Sequence[Cost]) -> dict[str, list[float]]:
    """Operating points at thresholds 0, 1/200, ..., 1, and at one that no margin reaches.

    ``refined`` and ``right`` count images; ``gmacs`` is the mean. costs: of an exit at the coarse and the fine level.
    """
    points: dict[str, list[float]] = {"threshold": [], "refined": [], "right": [], "gmacs": []}
    for threshold in [*(step / STEPS for step in range(STEPS + 1)), NEVER]:
        correct, (_, refined) = answers.at(threshold)
        points["threshold"].append(threshold)
        points["refined"].append(round(refined * len(correct)))
        points["right"].append(int(correct.sum()))
        points["gmacs"].append(expected(costs, [1 - refined, refined]).macs.gmacs)
    return points


def margins(answers: Observed) -> dict[str, list[int]]:
    """Histograms of the coarse margin over [0, 1], by which of the two levels are right: both, one or none."""
    coarse, fine = answers.coarse, answers.fine
    groups = {"both": coarse & fine, "fine alone": fine & ~coarse, "coarse alone": coarse & ~fine}
    groups["neither"] = ~coarse & ~fine
    return {name: torch.histc(answers.margin[0, group], BINS, 0, 1).long().tolist() for name, group in groups.items()}


@torch.no_grad()
def examples(teacher: CLIP, student: WaveTower, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Some of the first 500 test images, spread evenly over the order of their coarse margins, the surest first.

    Each has its name, both levels' guesses, its margin, and the pixels that the model saw as a data URI.
    """
    names = scenes_of(REVISION).class_names("seen")
    shown = list(batches("test", PART))
    levels = [probabilities for probabilities, _, _ in predictions(teacher, student, shown, prompts())]
    coarse, fine = torch.cat(levels, dim=1)
    margin, images = MarginGate(0.0).confidence(coarse), torch.cat([batch["image"] for batch in shown])
    labels = torch.cat([batch["label"] for batch in shown])
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

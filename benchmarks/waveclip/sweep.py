"""What a reader needs to turn the threshold of a one-level WaveCLIP by hand: the benchmark's report page shows it.

Shapes: B images of a batch, M pictures, E examples, C classes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.embedded import PART, batches, readings
from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.exits import Outcomes
from common.clip import CLIP, MEAN, STD
from common.data.embedded.module import EmbeddedDataModule, class_names
from common.deploy.early_exit import NEVER
from waveclip import MarginGate, WaveTower

STEPS, BINS, EXAMPLES = 200, 50, 24


def sweep(of: Outcomes, costs: Sequence[Cost]) -> dict[str, list[float]]:
    """Operating points at thresholds 0, 1/200, ..., 1, and at one that no margin reaches.

    ``refined`` and ``right`` count pictures; ``gmacs`` is the mean. costs: of leaving at the coarse and the fine level.
    """
    found: dict[str, list[float]] = {"threshold": [], "refined": [], "right": [], "gmacs": []}
    for threshold in [*(step / STEPS for step in range(STEPS + 1)), NEVER]:
        correct, share = of.at(threshold)
        found["threshold"].append(threshold)
        found["refined"].append(round(share * len(correct)))
        found["right"].append(int(correct.sum()))
        found["gmacs"].append(expected(costs, [1 - share, share]).macs.gmacs)
    return found


def margins(of: Outcomes) -> dict[str, list[int]]:
    """Histograms of the coarse margin over [0, 1], of pictures that both levels get right, one alone, or none."""
    groups = {
        "both": of.coarse & of.fine,
        "fine alone": of.fine & ~of.coarse,
        "coarse alone": of.coarse & ~of.fine,
        "neither": ~of.coarse & ~of.fine,
    }
    return {name: torch.histc(of.margin[which], BINS, 0, 1).long().tolist() for name, which in groups.items()}


@torch.no_grad()
def examples(teacher: CLIP, student: WaveTower, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Some of the first test pictures, evenly spread over the order of their coarse margins, the surest first.

    Each with its name, both levels' guesses, its margin, and the 48 px that the model saw as a data URI.
    """
    data, names = EmbeddedDataModule(), class_names("seen")
    shown = list(batches("test", PART))
    levels = zip(*(found for found, _, _ in readings(teacher, student, shown, data.class_prompts)), strict=True)
    coarse, fine = (torch.cat(level) for level in levels)
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

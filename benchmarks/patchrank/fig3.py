"""Patch Ranking's Figure 3 at embedded scale: what the paper's three scores find important, patch by patch.

Shapes: B pictures, N patch tokens, G grid side, C classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.patchrank.tasks import KEEP, PLAIN, PRUNE_LAYER
from common.conditions import conditions, digest
from common.data.classification import ClassificationSet
from common.data.pictures import loader
from common.zeroshot import embed_prompts
from patchrank.golden import GoldenRanking, golden_ranking
from patchrank.losses import kendall_tau, pruned_overlap
from patchrank.scores import keep_count

SCORES = {"label": "label-driven", "confidence": "maximum confidence", "feature": "feature preservation"}
SHOWN, COMPARED = 6, 128


def run(smoke: bool = False) -> dict[str, Any]:
    """The scores of the first test pictures, and how far the three agree on more of them. smoke: on fewer."""
    stated = conditions("embedded", seeds=None, dtype="float32", weights={PLAIN.weights.name: digest(PLAIN.weights)})
    pictures = PLAIN.pictures("test", SHOWN if smoke else COMPARED)
    rankings = rank(pictures)
    order = rankings["feature"].order
    pruned = order.shape[1] - keep_count(KEEP, order.shape[1])
    stated |= {"prune_layer": PRUNE_LAYER, "block": 2, "stride": 1, "rounds": 1, "pictures": len(pictures)}
    return {
        "name": "patchrank-fig3",
        "conditions": stated,
        "shown": shown(pictures),
        "scores": {name: found.scores[:SHOWN].tolist() for name, found in rankings.items()},
        "agreement": {
            name: {
                "tau": kendall_tau(found.scores, order).mean().item(),
                "overlap": pruned_overlap(found.scores, order, pruned).mean().item(),
            }
            for name, found in rankings.items()
        },
    }


def rank(pictures: ClassificationSet) -> dict[str, GoldenRanking]:
    """The golden rankings of some pictures by each score, one shot, sliding windows of 2x2."""
    clip = PLAIN.clip()
    classes = embed_prompts(clip, PLAIN.module.class_prompts)
    (batch,) = loader(pictures, clip.image_tower.image_size, len(pictures))
    text = {"class_embeddings": classes, "logit_scale": clip.logit_scale.exp(), "labels": batch["label"]}
    return {
        score: golden_ranking(clip.image_tower, batch["image"], score, prune_layer=PRUNE_LAYER, **text)
        for score in SCORES
    }


def shown(pictures: ClassificationSet, count: int = SHOWN) -> list[dict[str, str]]:
    """The first pictures with their names, as PNG files in base64, for a result that can be drawn by itself."""
    found = []
    for index in range(count):
        file = io.BytesIO()
        pictures.picture(index).save(file, "PNG")
        name = pictures.class_names[pictures.labels[index]]
        found.append({"name": name, "png": base64.b64encode(file.getvalue()).decode()})
    return found


def opened(entry: dict[str, str]) -> np.ndarray:
    """A picture that ``shown`` has written, uint8 [H,W,3]."""
    with Image.open(io.BytesIO(base64.b64decode(entry["png"]))) as picture:
        return np.array(picture.convert("RGB"))


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    stated = result["conditions"]
    lines = ["| score | Kendall's τ with feature preservation | dropped alike at keep 0.6 |", "|---|---:|---:|"]
    for name, found in result["agreement"].items():
        lines.append(f"| {SCORES[name]} | {found['tau']:.2f} | {100 * found['overlap']:.0f} % |")
    note = (
        f"Embedded scale, mean over {stated['pictures']} test pictures: golden rankings before block "
        f"{stated['prune_layer']} by windows of {stated['block']}x{stated['block']} patches. Bright patches cost most "
        "when they are removed. Only feature preservation needs neither labels nor class names. Pictures: Twemoji, "
        "CC-BY 4.0."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"patchrank-fig3": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    entries = result["shown"]
    figure = Figure(figsize=(1.5 * len(entries) + 0.8, 6.2), layout="constrained")
    grid: Sequence = figure.subplots(1 + len(SCORES), len(entries))
    for column, entry in enumerate(entries):
        grid[0][column].imshow(opened(entry))
        grid[0][column].set_title(entry["name"], fontsize=8)
        for row, (name, title) in enumerate(SCORES.items(), 1):
            scores = torch.tensor(result["scores"][name][column])
            side = round(len(scores) ** 0.5)
            grid[row][column].imshow(scores.view(side, side), cmap="viridis")
            if not column:
                grid[row][column].set_ylabel(title, fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure

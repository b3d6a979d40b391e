"""Patch Ranking's Figure 3 at embedded scale: the importance of each patch by the paper's three scores.

Shapes: H, W height and width of a picture in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.cells import table
from benchmarks.patchrank.tasks import KEEP, PRUNE_LAYER, SHAPES
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
    """The scores of some pictures of val, and the agreement of the three on more of them. smoke: on fewer."""
    setting = conditions("embedded", seeds=None, dtype="float32", weights={SHAPES.weights.name: digest(SHAPES.weights)})
    pictures = SHAPES.pictures("val", SHOWN if smoke else COMPARED)
    rankings = rank(pictures)
    order = rankings["feature"].order
    pruned = order.shape[1] - keep_count(KEEP, order.shape[1])
    setting |= {"prune_layer": PRUNE_LAYER, "block": 2, "stride": 1, "rounds": 1, "pictures": len(pictures)}
    return {
        "name": "patchrank-fig3",
        "conditions": setting,
        "shown": shown(pictures),
        "scores": {name: ranking.scores[:SHOWN].tolist() for name, ranking in rankings.items()},
        "agreement": {
            name: {
                "tau": kendall_tau(ranking.scores, order).mean().item(),
                "overlap": pruned_overlap(ranking.scores, order, pruned).mean().item(),
            }
            for name, ranking in rankings.items()
        },
    }


def rank(pictures: ClassificationSet) -> dict[str, GoldenRanking]:
    """The golden rankings of pictures by each score: one shot, sliding windows of 2x2."""
    clip = SHAPES.clip()
    classes = embed_prompts(clip, SHAPES.module.class_prompts)
    (batch,) = loader(pictures, clip.preprocess, len(pictures))
    text = {"class_embeddings": classes, "logit_scale": clip.logit_scale.exp(), "labels": batch["label"]}
    return {
        score: golden_ranking(clip.image_tower, batch["image"], score, prune_layer=PRUNE_LAYER, **text)
        for score in SCORES
    }


def shown(pictures: ClassificationSet, count: int = SHOWN) -> list[dict[str, str]]:
    """The first pictures with their names, as PNG in base64, so that a result can be drawn without the data."""
    entries = []
    for index in range(count):
        file = io.BytesIO()
        pictures.picture(index).save(file, "PNG")
        name = pictures.class_names[pictures.labels[index]]
        entries.append({"name": name, "png": base64.b64encode(file.getvalue()).decode()})
    return entries


def opened(entry: dict[str, str]) -> np.ndarray:
    """The picture of an entry of ``shown``, uint8 [H,W,3]."""
    with Image.open(io.BytesIO(base64.b64decode(entry["png"]))) as picture:
        return np.array(picture.convert("RGB"))


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    setting = result["conditions"]
    rows = [
        (SCORES[name], f"{agreement['tau']:.2f}", f"{100 * agreement['overlap']:.0f} %")
        for name, agreement in result["agreement"].items()
    ]
    note = (
        f"Scenes of shape, mean over {setting['pictures']} pictures of val: golden rankings before block "
        f"{setting['prune_layer']} by windows of {setting['block']}x{setting['block']} patches. Bright patches cost "
        "most when they are removed. Only feature preservation needs neither labels nor class names. Pictures: "
        "Twemoji, CC-BY 4.0."
    )
    text = table(["score", "Kendall's τ with feature preservation", "dropped alike at keep 0.6"], rows)
    return {"md": f"{text}\n\n{note}\n", "figures": {"patchrank-fig3": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    rows = {}
    for name, title in SCORES.items():
        scores = [torch.tensor(values) for values in result["scores"][name]]
        rows[title] = [values.view(round(len(values) ** 0.5), -1).numpy() for values in scores]
    return sheet(result["shown"], rows, 1.55)


def sheet(entries: list[dict[str, str]], rows: Mapping[str, Sequence[np.ndarray]], row_height: float = 1.6) -> Figure:
    """The pictures of ``shown`` in a row, and below them one titled row after another of an image for each picture."""
    figure = Figure(figsize=(1.5 * len(entries) + 0.8, row_height * (1 + len(rows))), layout="constrained")
    grid = figure.subplots(1 + len(rows), len(entries))
    for column, entry in enumerate(entries):
        grid[0][column].imshow(opened(entry))
        grid[0][column].set_title(entry["name"], fontsize=8)
    for axes, (title, images) in zip(grid[1:], rows.items(), strict=True):
        axes[0].set_ylabel(title, fontsize=8)
        for panel, image in zip(axes, images, strict=True):
            panel.imshow(image)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure

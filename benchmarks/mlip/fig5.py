"""MLIP's Figure 5 at embedded scale: the ten best pictures of both models for a caption.

Shapes: M pictures with one caption each, E joint dim.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from benchmarks.cells import table
from benchmarks.embedded import batches
from benchmarks.mlip.models import BASELINE, COMPARED, MODEL, TITLES, models, needing, not_run
from common.data.embedded.module import indices, scene
from common.data.embedded.scenes import CANVAS, VIEW
from common.retrieval import ranks, recall
from common.zeroshot import embed_prompts

SHOWN, TOP = 3, 10
"""The sheet shows the split's first so many captions, and so many pictures for each."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Both models' answers on ``retrieval`` (smoke: its first 250), or the commands that train them."""
    return needing("mlip-fig5", (BASELINE, MODEL), lambda: _measure(250 if smoke else None), dtype="float32")


@torch.no_grad()
def _measure(pictures: int | None) -> dict[str, Any]:
    captions = [scene("retrieval", index)[1] for index in indices("retrieval")[:pictures]]
    clips, images = models(), {name: [] for name in TITLES}
    for batch in track(batches("retrieval", pictures), "embedding retrieval"):
        for name, clip in clips.items():
            images[name].append(clip.encode_image(batch["image"]))
    results = {name: answers(torch.cat(images[name]), embed_prompts(clip, captions)) for name, clip in clips.items()}
    return {"pictures": len(captions), "captions": captions[:SHOWN], "found": results}


def answers(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """Text-to-image retrieval with texts [M,E] and their pictures [M,E].

    recall: over all texts.  places: the rank of the right picture for each of the first texts.
    top: the best pictures for each of them, by their numbers in the split, the best first.
    """
    _, text_ranks = ranks(images, texts, torch.arange(len(texts)))
    best = (texts[:SHOWN] @ images.T).topk(min(TOP, len(images))).indices
    return {"recall": recall(text_ranks), "places": text_ranks[:SHOWN].tolist(), "top": best.tolist()}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if absent := not_run(result):
        return absent
    recalls = list(result["found"][next(iter(TITLES))]["recall"])
    rows = [
        [TITLES[name], *(f"{100 * answer['recall'][recall]:.1f}" for recall in recalls), *answer["places"]]
        for name, answer in result["found"].items()
    ]
    captions = "; ".join(f"({number + 1}) {caption}" for number, caption in enumerate(result["captions"]))
    note = (
        f"{COMPARED}. Each caption fits one of {result['pictures']:,} pictures. The sheet shows the split's first "
        f"captions, not chosen ones: {captions}. A green frame marks the right picture. The paper's is of MS-COCO."
    )
    text = table(["text to image", *recalls, *(f"place, caption {n + 1}" for n in range(SHOWN))], rows)
    return {"md": f"{text}\n\n{note}\n", "figures": {"mlip-fig5": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(TOP * 0.95, 2.25 * SHOWN), layout="constrained")
    pictures = indices("retrieval")
    parts = figure.subfigures(SHOWN, 1)
    for caption, part in enumerate(parts):
        part.suptitle(f"({caption + 1}) {result['captions'][caption]}", fontsize=10)
        panels = part.subplots(len(TITLES), TOP)
        for row, (name, answer) in zip(panels, result["found"].items(), strict=True):
            row[0].set_ylabel(TITLES[name], fontsize=9)
            for panel, picture in zip(row, answer["top"][caption], strict=False):
                panel.imshow(_view(pictures[picture]))
                panel.set(xticks=[], yticks=[])
                right = picture == caption
                panel.spines[:].set(color="tab:green" if right else "lightgray", linewidth=4 if right else 1)
    return figure


def _view(index: int) -> Image.Image:
    """The part of a picture of ``retrieval`` that a model sees."""
    return ImageOps.crop(scene("retrieval", index)[0].render(), (CANVAS - VIEW) // 2)

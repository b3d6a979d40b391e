"""MLIP's Figure 5 at embedded scale: the ten pictures that either model finds for a caption.

Shapes: M pictures with one caption each, E joint dim.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from benchmarks.embedded import batches
from benchmarks.mlip.models import BASELINE, COMPARED, MODEL, TITLES, models, needing, not_run
from common.data.embedded.module import indices, scene
from common.data.embedded.scenes import CANVAS, VIEW
from common.retrieval import ranks, recall
from common.zeroshot import embed_prompts

SHOWN, TOP = 3, 10
"""The captions of the sheet, the first of the split, and the pictures for each."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Both models' answers on ``retrieval`` (smoke: its first 250), or the commands that make the weights."""
    return needing("mlip-fig5", (BASELINE, MODEL), lambda: _measure(250 if smoke else None), dtype="float32")


@torch.no_grad()
def _measure(pictures: int | None) -> dict[str, Any]:
    captions = [scene("retrieval", index)[1] for index in indices("retrieval")[:pictures]]
    towers, seen = models(), {name: [] for name in TITLES}
    for batch in track(batches("retrieval", pictures), "embedding retrieval"):
        for name, model in towers.items():
            seen[name].append(model.encode_image(batch["image"]))
    found = {name: answers(torch.cat(seen[name]), embed_prompts(towers[name], captions)) for name in TITLES}
    return {"pictures": len(captions), "captions": captions[:SHOWN], "found": found}


def answers(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """Recall of M texts [M,E] among their pictures [M,E]; the first texts' places of the right one, and best pictures.

    ``top`` numbers pictures in the split's order, the best first.
    """
    _, of_text = ranks(images, texts, torch.arange(len(texts)))
    best = (texts[:SHOWN] @ images.T).topk(min(TOP, len(images))).indices
    return {"recall": recall(of_text), "places": of_text[:SHOWN].tolist(), "top": best.tolist()}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if missing := not_run(result):
        return missing
    names = list(result["found"][next(iter(TITLES))]["recall"])
    lines = [
        f"| text to image | {' | '.join(names)} | {' | '.join(f'place, caption {n + 1}' for n in range(SHOWN))} |",
        f"|---|{'---:|' * (len(names) + SHOWN)}",
    ]
    for name, found in result["found"].items():
        cells = [*(f"{100 * found['recall'][each]:.1f}" for each in names), *map(str, found["places"])]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    captions = "; ".join(f"({number + 1}) {caption}" for number, caption in enumerate(result["captions"]))
    note = (
        f"{COMPARED}. Each caption fits one of {result['pictures']:,} pictures. The sheet shows the split's first "
        f"captions, not chosen ones: {captions}. A green frame marks the right picture. The paper's is of MS-COCO."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"mlip-fig5": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(TOP * 0.95, 2.25 * SHOWN), layout="constrained")
    pictures = indices("retrieval")
    parts = figure.subfigures(SHOWN, 1)
    for caption, part in enumerate(parts):
        part.suptitle(f"({caption + 1}) {result['captions'][caption]}", fontsize=10)
        panels = part.subplots(len(TITLES), TOP)
        for row, (name, found) in zip(panels, result["found"].items(), strict=True):
            row[0].set_ylabel(TITLES[name], fontsize=9)
            for panel, picture in zip(row, found["top"][caption], strict=False):
                panel.imshow(_view(pictures[picture]))
                panel.set(xticks=[], yticks=[])
                right = picture == caption
                panel.spines[:].set(color="tab:green" if right else "lightgray", linewidth=4 if right else 1)
    return figure


def _view(index: int) -> Image.Image:
    """What a model sees of a picture of ``retrieval``."""
    return ImageOps.crop(scene("retrieval", index)[0].render(), (CANVAS - VIEW) // 2)

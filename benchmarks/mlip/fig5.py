"""MLIP's Figure 5: the ten best pictures of both models for a caption.

Shapes: M pictures with one caption each, E joint dim, B pictures of a batch, S picture size, t of a small one.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cells import table
from benchmarks.embedded import REVISION
from benchmarks.mlip.models import BASELINE, MODEL, TITLES, Subject, compared, folder, not_run, shown
from common.data.embedded.splits import indices, scene
from common.data.embedded.twemoji import CANVAS, VIEW
from common.preprocess import Preprocess
from common.retrieval import ranks, recall
from common.zeroshot import embed_prompts

__all__ = ["answers", "folder", "render", "run"]

SHOWN, TOP = 3, 10
"""The sheet shows the split's first so many captions, and so many pictures for each."""
_SMALL = 96
"""Pixels of a picture on the sheet, where it has to be stored."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Both models' answers on the pictures for retrieval (smoke: the first 250); see ``shown``."""
    weights = {"clip": BASELINE, "mlip": MODEL}
    return shown("mlip-fig5", weights, lambda subject: _measure(subject, 250 if smoke else None), dtype="float32")


@torch.no_grad()
def _measure(subject: Subject, limit: int | None) -> dict[str, Any]:
    pictures = subject.pictures("retrieval")
    captions = [texts[0] for texts in pictures.captions[:limit]]
    found, small = {}, []
    for name, model in subject.models.items():
        images = []
        for batch in subject.batches(name, pictures, limit):
            images.append(model.encode_image(batch["image"]).cpu())
            if name == "clip" and subject.names is not None:  # the embedded ones are drawn again instead
                small.append(_reduced(batch["image"], model.preprocess))
        every = torch.cat(images)[: len(captions)]
        found[name] = answers(every, embed_prompts(model, captions, truncate=True).cpu())
    result = {"pictures": len(captions), "captions": captions[:SHOWN], "found": found}
    if small:
        every = torch.cat(small)
        best = {place for answer in found.values() for top in answer["top"] for place in top}
        result["shown"] = {str(place): _encoded(every[place]) for place in sorted(best)}
    return result


def _reduced(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Normalised images [B,3,S,S] -> their pixels, uint8 [B,3,t,t]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = F.interpolate(images * std + mean, (_SMALL, _SMALL), mode="bilinear", antialias=True)
    return (255 * pixels).round().clamp(0, 255).byte().cpu()


def _encoded(pixels: Tensor) -> str:
    """uint8 [3,t,t] -> a JPEG in base64."""
    file = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return b64encode(file.getvalue()).decode()


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
        f"{compared(result)}. Each caption fits one of {result['pictures']:,} pictures; where a picture has several, "
        "the first is asked for. The sheet shows the split's first "
        f"captions, not chosen ones: {captions}. A green frame marks the right picture. The paper's is of MS-COCO."
    )
    text = table(["text to image", *recalls, *(f"place, caption {n + 1}" for n in range(SHOWN))], rows)
    return {"md": f"{text}\n\n{note}\n", "figures": {result["name"]: _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(TOP * 0.95, 2.25 * SHOWN), layout="constrained")
    picture_at = _pictures(result)
    parts = figure.subfigures(SHOWN, 1)
    for caption, part in enumerate(parts):
        part.suptitle(f"({caption + 1}) {result['captions'][caption]}", fontsize=10)
        panels = part.subplots(len(TITLES), TOP)
        for row, (name, answer) in zip(panels, result["found"].items(), strict=True):
            row[0].set_ylabel(TITLES[name], fontsize=9)
            for panel, picture in zip(row, answer["top"][caption], strict=False):
                panel.imshow(picture_at(picture))
                panel.set(xticks=[], yticks=[])
                right = picture == caption
                panel.spines[:].set(color="tab:green" if right else "lightgray", linewidth=4 if right else 1)
    return figure


def _pictures(result: dict[str, Any]) -> Callable[[int], Image.Image]:
    """Gives a picture of the result's set by its place; those of the embedded set are drawn, as a model sees them."""
    if "shown" in result:
        return lambda place: Image.open(BytesIO(b64decode(result["shown"][str(place)])))
    drawn = indices("retrieval", REVISION)
    return lambda place: ImageOps.crop(scene("retrieval", drawn[place], REVISION)[0].render(), (CANVAS - VIEW) // 2)

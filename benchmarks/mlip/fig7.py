"""MLIP's Figure 7: t-SNE maps of both models' embeddings, for pictures of ten classes; embedded: held-out names.

Shapes: M pictures, E joint dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.cells import accuracy, points, table
from benchmarks.figures import COLOURS
from benchmarks.mlip.models import BASELINE, MODEL, TITLES, Subject, compared, folder, not_run, shown, spread
from common.evaluate.accuracy import paired_difference, wilson_interval

__all__ = ["folder", "nearest_agrees", "render", "run", "tsne"]

NAMES, PERPLEXITY = 10, 30.0
PICTURES = 2000
"""Exact t-SNE takes the square of so many pictures."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Both maps of the first classes' pictures (smoke: a few of them); see ``shown``."""
    weights, setting = {"clip": BASELINE, "mlip": MODEL}, {"dtype": "float32", "perplexity": PERPLEXITY}
    return shown("mlip-fig7", weights, lambda subject: _measure(subject, 1000 if smoke else None), **setting)


@torch.no_grad()
def _measure(subject: Subject, limit: int | None) -> dict[str, Any]:
    pictures, maps, right = subject.pictures("zeroshot", "unseen-alone"), {}, {}
    for name, model in subject.models.items():
        embeddings, labels = [], []
        for batch in subject.batches(name, pictures, limit):
            chosen = batch["label"] < NAMES
            if not chosen.any():
                continue
            labels.append(batch["label"][chosen].cpu())
            embeddings.append(model.encode_image(batch["image"][chosen]).cpu())
        every, label = torch.cat(embeddings), torch.cat(labels)
        part = spread(range(len(label)), PICTURES)
        maps[name], label = every[part], label[part]
        right[name] = nearest_agrees(maps[name], label)
    return {
        "names": list(pictures.class_names[:NAMES]),
        "labels": label.tolist(),
        "nearest": {
            name: {
                "accuracy": agrees.double().mean().item(),
                "interval": wilson_interval(int(agrees.sum()), len(agrees)),
            }
            for name, agrees in right.items()
        },
        "difference": paired_difference(right["mlip"], right["clip"]),
        "maps": {name: tsne(embeddings).tolist() for name, embeddings in maps.items()},
    }


def tsne(embeddings: Tensor) -> np.ndarray:
    """Exact t-SNE (van der Maaten and Hinton, JMLR 9, 2008): embeddings [M,E] -> a map [M,2], to three decimals.

    It starts at the principal components, so equal embeddings give equal maps. M must exceed PERPLEXITY.
    """
    from sklearn.manifold import TSNE  # of the dev extra; a stored result is rendered without it

    places = TSNE(perplexity=PERPLEXITY, init="pca", method="exact", random_state=0).fit_transform(embeddings.numpy())
    return places.astype(float).round(3)


def nearest_agrees(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest other embedding has the same label: unit embeddings [M,E], labels [M] -> bool [M]."""
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    return labels[cosines.argmax(1)] == labels


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if absent := not_run(result):
        return absent
    rows = [
        (TITLES[name], accuracy(nearest["accuracy"], nearest["interval"]))
        for name, nearest in result["nearest"].items()
    ]
    what = "classes" if "subject" in result else "names held out of training"
    change, interval = points(result["difference"]).split(" ", 1)
    note = (
        f"{compared(result)}: {len(result['labels'])} pictures of {len(result['names'])} {what} "
        f"({', '.join(result['names'])}). MLIP less CLIP: {change} points {interval}, paired "
        f"bootstrap. Neighbours are those of the embedding; the maps are exact t-SNE of perplexity {PERPLEXITY:.0f}, "
        "begun at the principal components. The paper shows CIFAR-10, without numbers."
    )
    text = table(["model", "nearest other picture has the same name [95 %]"], rows)
    return {"md": f"{text}\n\n{note}\n", "figures": {result["name"]: _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    labels = torch.tensor(result["labels"])
    panels = figure.subplots(1, len(TITLES))
    for panel, (model, places) in zip(panels, result["maps"].items(), strict=True):
        places = torch.tensor(places)
        for label, name in enumerate(result["names"]):
            mark = "ox"[label // len(COLOURS)]  # seven colours, and another mark for the names after them
            panel.scatter(*places[labels == label].T, s=9, color=COLOURS[label % len(COLOURS)], marker=mark, label=name)
        panel.set(title=TITLES[model], xticks=[], yticks=[])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    return figure

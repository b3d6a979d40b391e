"""MLIP's Figure 7 at embedded scale: how far apart either model puts pictures of names that it never saw.

Shapes: M pictures, E joint dim.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from benchmarks.embedded import batches
from benchmarks.mlip.models import BASELINE, COMPARED, MODEL, TITLES, models, needing, not_run
from benchmarks.mlip.tsne import tsne
from common.data.embedded.scenes import class_names
from common.evaluate.accuracy import paired_difference, wilson_interval

NAMES, PERPLEXITY, STEPS = 10, 30.0, 1000


def run(smoke: bool = False) -> dict[str, Any]:
    """Both maps of the first held-out names' pictures (smoke: a few of them), or the commands that make the weights."""
    measure = (lambda: _measure(1000, 50)) if smoke else (lambda: _measure(None, STEPS))
    return needing("mlip-fig7", (BASELINE, MODEL), measure, dtype="float32", perplexity=PERPLEXITY)


@torch.no_grad()
def _measure(pictures: int | None, steps: int) -> dict[str, Any]:
    first = len(class_names("seen"))
    towers, seen, labels = models(), {name: [] for name in TITLES}, []
    for batch in track(batches("unseen", pictures), "embedding unseen"):
        chosen = batch["label"] < first + NAMES
        labels.append(batch["label"][chosen] - first)
        for name, model in towers.items():
            seen[name].append(model.encode_image(batch["image"][chosen]))
    label = torch.cat(labels)
    right = {name: nearest_agrees(torch.cat(parts), label) for name, parts in seen.items()}
    maps = {name: tsne(torch.cat(parts).double().numpy(), PERPLEXITY, steps) for name, parts in seen.items()}
    return {
        "names": class_names("unseen")[:NAMES],
        "labels": label.tolist(),
        "nearest": {
            name: {"accuracy": found.double().mean().item(), "interval": wilson_interval(int(found.sum()), len(found))}
            for name, found in right.items()
        },
        "difference": paired_difference(right["mlip"], right["clip"]),
        "maps": {
            name: [[round(float(value), 3) for value in point] for point in found] for name, found in maps.items()
        },
    }


def nearest_agrees(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Whether each unit embedding's [M,E] nearest other one has its label [M] -> bool [M]."""
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    return labels[cosines.argmax(1)] == labels


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if missing := not_run(result):
        return missing
    lines = ["| model | nearest other picture has the same name [95 %] |", "|---|---:|"]
    for name, found in result["nearest"].items():
        low, high = (100 * end for end in found["interval"])
        lines.append(f"| {TITLES[name]} | {100 * found['accuracy']:.1f} [{low:.1f}, {high:.1f}] |")
    change, low, high = (100 * value for value in result["difference"])
    note = (
        f"{COMPARED}: {len(result['labels'])} pictures of {len(result['names'])} names held out of training "
        f"({', '.join(result['names'])}). MLIP less CLIP: {change:+.1f} points [{low:+.1f}, {high:+.1f}], paired "
        f"bootstrap. Neighbours are those of the embedding; the maps are exact t-SNE of perplexity {PERPLEXITY:.0f}, "
        "begun at the principal components. The paper shows CIFAR-10, without numbers."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"mlip-fig7": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    labels = torch.tensor(result["labels"])
    panels = figure.subplots(1, len(TITLES))
    for panel, (name, points) in zip(panels, result["maps"].items(), strict=True):
        points = torch.tensor(points)
        for label, called in enumerate(result["names"]):
            panel.scatter(*points[labels == label].T, s=9, color=f"C{label}", label=called)
        panel.set(title=TITLES[name], xticks=[], yticks=[])
    handles, called = panels[0].get_legend_handles_labels()
    figure.legend(handles, called, loc="outside right center", fontsize=8)
    return figure

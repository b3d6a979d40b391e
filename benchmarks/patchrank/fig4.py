"""Patch Ranking's Figure 4 at embedded scale: the patches that are kept at 50 %, by class attention and by ranking.

Shapes: B pictures, N patch tokens, R kept, G grid side, E joint dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks.patchrank.fig3 import SHOWN, opened, shown
from benchmarks.patchrank.rows import COMMAND
from benchmarks.patchrank.tasks import FOR_ALL, PLAIN, PRUNE_LAYER, search
from common.conditions import conditions, digest
from common.data.pictures import loader
from common.reduction import ReducedTower
from patchrank.baselines import ClassAttention, GoldenOracle
from patchrank.golden import golden_ranking
from patchrank.predictor import load_predictor
from patchrank.tower import PatchRankTower

KEEP, COMPARED = 0.5, 256
ATTENTION, ORACLE, PREDICTOR = "class attention", "golden ranking", "predictor"


@torch.no_grad()
def run(smoke: bool = False) -> dict[str, Any]:
    """What each method keeps of the first test pictures, and what the embeddings of more of them lose by it."""
    files = [path for path in (PLAIN.weights, FOR_ALL) if path.is_file()]
    stated = conditions("embedded", seeds=1, dtype="float32", weights={path.name: digest(path) for path in files})
    clip, pictures = PLAIN.clip(), PLAIN.pictures("test", SHOWN if smoke else COMPARED)
    tower = clip.image_tower
    (batch,) = loader(pictures, tower.image_size, len(pictures))
    order = golden_ranking(tower, batch["image"], prune_layer=PRUNE_LAYER, **search(tower.grid**2)).order
    towers = {
        ATTENTION: ReducedTower(tower, {PRUNE_LAYER: ClassAttention(KEEP)}),
        ORACLE: ReducedTower(tower, {PRUNE_LAYER: GoldenOracle(KEEP, order)}),
    }
    if FOR_ALL in files:
        towers[PREDICTOR] = PatchRankTower(tower, load_predictor(FOR_ALL, tower, PRUNE_LAYER).eval(), KEEP, PRUNE_LAYER)
    full, kept, lost = tower(batch["image"]), {}, {}
    for name, made in towers.items():
        x, context = made.run(batch["image"])
        kept[name] = context.positions
        lost[name] = (1 - F.cosine_similarity(full, tower.pool(x), dim=-1)).mean().item()
    return {
        "name": "patchrank-fig4",
        "conditions": stated | {"keep": KEEP, "prune_layer": PRUNE_LAYER, "pictures": len(pictures)},
        "shown": shown(pictures),
        "grid": tower.grid,
        "kept": {name: places[:SHOWN].tolist() for name, places in kept.items()},
        "lost": lost,
        "shared": {name: _shared(places, kept[ORACLE]) for name, places in kept.items()},
    }


def _shared(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of kept places [B,R] that another method keeps too, the mean over pictures."""
    return (first[:, :, None] == second[:, None]).any(-1).float().mean().item()


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    stated = result["conditions"]
    lines = ["| method | kept as the golden ranking does | 1 - cosine to the full embedding |", "|---|---:|---:|"]
    for name in result["kept"]:
        lines.append(f"| {name} | {100 * result['shared'][name]:.0f} % | {result['lost'][name]:.3f} |")
    if PREDICTOR not in result["kept"]:
        lines.append(f"| {PREDICTOR} | not run: `{COMMAND}` | |")
    note = (
        f"Embedded scale, {stated['keep']:.0%} of the patches kept before block {stated['prune_layer']}, mean over "
        f"{stated['pictures']} test pictures. The golden ranking (feature preservation, greedy) has seen the whole "
        "tower at work on the picture; class attention and predictor read what enters the block. Pictures: Twemoji, "
        "CC-BY 4.0."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"patchrank-fig4": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    entries, side = result["shown"], result["grid"]
    figure = Figure(figsize=(1.5 * len(entries) + 0.8, 1.6 * (1 + len(result["kept"]))), layout="constrained")
    axes = figure.subplots(1 + len(result["kept"]), len(entries))
    for column, entry in enumerate(entries):
        picture = opened(entry)
        axes[0][column].imshow(picture)
        axes[0][column].set_title(entry["name"], fontsize=8)
        for row, (name, kept) in enumerate(result["kept"].items(), 1):
            mask = np.zeros(side * side, dtype=bool)
            mask[kept[column]] = True
            patch = picture.shape[0] // side
            whole = mask.reshape(side, side).repeat(patch, 0).repeat(patch, 1)[..., None]
            axes[row][column].imshow(np.where(whole, picture, 255 - (255 - picture) // 6))
            if not column:
                axes[row][column].set_ylabel(name, fontsize=8)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
    return figure

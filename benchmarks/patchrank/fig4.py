"""Patch Ranking's Figure 4 at embedded scale: the patches kept at 50 %, by class attention and by rankings.

Shapes: B pictures, R kept patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks.cells import table
from benchmarks.patchrank.fig3 import SHOWN, opened, sheet, shown
from benchmarks.patchrank.runs import COMMAND
from benchmarks.patchrank.tasks import COMMITTED, PRUNE_LAYER, SHAPES, search
from common.conditions import conditions, digest
from common.data.pictures import loader
from common.preprocess import Preprocess
from common.reduction import ReducedTower
from patchrank.golden import golden_ranking
from patchrank.predictor import load_predictor
from patchrank.reducers import ClassAttention, GoldenOracle
from patchrank.tower import PatchRankTower

KEEP, COMPARED = 0.5, 256
ATTENTION, ORACLE, PREDICTOR = "class attention", "golden ranking", "predictor"


@torch.no_grad()
def run(smoke: bool = False) -> dict[str, Any]:
    """The patches that each method keeps of some pictures of val, and what embeddings lose on more of them."""
    own = COMMITTED / f"{SHAPES.key}.safetensors"
    files = [path for path in (SHAPES.weights, own) if path.is_file()]
    setting = conditions("embedded", seeds=1, dtype="float32", weights={path.name: digest(path) for path in files})
    clip, pictures = SHAPES.clip(), SHAPES.pictures("val", SHOWN if smoke else COMPARED)
    tower = clip.image_tower
    (batch,) = loader(pictures, Preprocess(tower.image_size), len(pictures))
    order = golden_ranking(tower, batch["image"], prune_layer=PRUNE_LAYER, **search(tower.grid**2)).order
    towers = {
        ATTENTION: ReducedTower(tower, {PRUNE_LAYER: ClassAttention(KEEP)}),
        ORACLE: ReducedTower(tower, {PRUNE_LAYER: GoldenOracle(KEEP, order)}),
    }
    if own in files:
        towers[PREDICTOR] = PatchRankTower(tower, load_predictor(own, tower, PRUNE_LAYER).eval(), KEEP, PRUNE_LAYER)
    full, kept, lost = tower(batch["image"]), {}, {}
    for name, reduced in towers.items():
        x, context = reduced.run(batch["image"])
        kept[name] = context.positions
        lost[name] = (1 - F.cosine_similarity(full, tower.pool(x), dim=-1)).mean().item()
    return {
        "name": "patchrank-fig4",
        "conditions": setting | {"keep": KEEP, "prune_layer": PRUNE_LAYER, "pictures": len(pictures)},
        "shown": shown(pictures),
        "grid": tower.grid,
        "kept": {name: places[:SHOWN].tolist() for name, places in kept.items()},
        "lost": lost,
        "shared": {name: _shared(places, kept[ORACLE]) for name, places in kept.items()},
    }


def _shared(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of the kept places [B,R] that another method keeps too, averaged over pictures."""
    return (first[:, :, None] == second[:, None]).any(-1).float().mean().item()


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    setting = result["conditions"]
    rows = [(name, f"{100 * result['shared'][name]:.0f} %", f"{result['lost'][name]:.3f}") for name in result["kept"]]
    if PREDICTOR not in result["kept"]:
        rows.append((PREDICTOR, f"not run: `{COMMAND}`", ""))
    note = (
        f"Scenes of shape, {setting['keep']:.0%} of the patches kept before block {setting['prune_layer']}, mean over "
        f"{setting['pictures']} pictures of val. The golden ranking (feature preservation, greedy) has seen the whole "
        "tower at work on the picture; class attention and predictor read what enters the block. Pictures: Twemoji, "
        "CC-BY 4.0."
    )
    text = table(["method", "kept as the golden ranking does", "1 - cosine to the full embedding"], rows)
    return {"md": f"{text}\n\n{note}\n", "figures": {"patchrank-fig4": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    pictures = [opened(entry) for entry in result["shown"]]
    rows = {
        name: [_faded(picture, places, result["grid"]) for picture, places in zip(pictures, kept, strict=True)]
        for name, kept in result["kept"].items()
    }
    return sheet(result["shown"], rows)


def _faded(picture: np.ndarray, kept: list[int], grid: int) -> np.ndarray:
    """The picture [H,W,3] with its dropped patches at a sixth of their contrast with white."""
    mask = np.zeros(grid * grid, dtype=bool)
    mask[kept] = True
    patch = picture.shape[0] // grid
    pixels = mask.reshape(grid, grid).repeat(patch, 0).repeat(patch, 1)[..., None]
    return np.where(pixels, picture, 255 - (255 - picture) // 6)

"""Patch Ranking's costs: every method's multiply-adds and time by keep rate at ViT-B/16, and a golden ranking's.

Shapes: B images, N patch tokens, S image size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.baselines import BASELINES, TEACHER
from benchmarks.embedded import models
from benchmarks.timing import seconds
from common.conditions import conditions
from common.flops import count_macs
from common.reduction import Place, ReducedTower, Reducer
from common.tower import ImageTower
from patchrank.baselines import ClassAttention, EViT, RandomKeep, ToMe
from patchrank.golden import golden_macs, golden_ranking
from patchrank.predictor import RankPredictor
from patchrank.scores import grid_blocks, keep_count, removal_costs
from patchrank.tower import PatchRankTower

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
LAYERS = (0, 3)
DENSE, PREDICTOR = "all tokens", "Patch Ranking"
SAMPLE = 13
"""Of ViT-B/16's 169 windows, every so many-th is timed alone; all would take a minute."""


def merging(patches: int, blocks: int, keep: float, layer: int) -> dict[Place, Reducer]:
    """ToMe in every block from ``layer`` on, evenly.

    So many go that, summed over the blocks, as many tokens are gone as when ``keep`` of the patches enter ``layer``.
    """
    removed = round(2 * (patches - keep_count(keep, patches)) / (blocks - layer + 1))
    return {(i, "middle"): ToMe(removed) for i in range(layer, blocks)}


def training_free(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """The methods that need no training, at one keep rate from block ``layer`` on."""
    patches, blocks = tower.grid**2, len(tower.transformer.resblocks)
    return {
        "given scores": ReducedTower(tower, {layer: RandomKeep(keep)}),
        "class attention": ReducedTower(tower, {layer: ClassAttention(keep)}),
        "EViT": ReducedTower(tower, {(layer, "middle"): EViT(keep)}),
        "ToMe": ReducedTower(tower, merging(patches, blocks, keep, layer)),
    }


def methods(tower: ImageTower, keep: float, layer: int) -> dict[str, nn.Module]:
    """These, and Patch Ranking with a predictor of random weights."""
    ours = PatchRankTower(tower, RankPredictor.for_tower(tower), keep, layer)
    return {**training_free(tower, keep, layer), PREDICTOR: ours}


def pruning(tower: ImageTower, keeps: tuple[float, ...], batches: Mapping[bool, int], rounds: int) -> list[dict]:
    """A row for each layer, keep rate and method, and what it saves against all tokens, in GMACs and in time.

    batches: images in a timed batch, of the predictor (True) and of the others (False).
    """
    size = tower.image_size
    images = torch.randn(max(batches.values()), 3, size, size, generator=torch.Generator().manual_seed(0))
    dense = count_macs(tower, images[:1])
    rows = []
    for layer in LAYERS:
        built = {(name, keep): model for keep in keeps for name, model in methods(tower, keep, layer).items()}
        for ours, batch in batches.items():
            chosen = {key: model for key, model in built.items() if (key[0] == PREDICTOR) == ours}
            calls = {DENSE: tower, **chosen}
            some = images[:batch]
            taken = seconds({key: partial(model, some) for key, model in calls.items()}, rounds)
            for (name, keep), model in chosen.items():
                macs = count_macs(model, images[:1])
                rows.append(
                    {
                        "layer": layer,
                        "keep": keep,
                        "method": name,
                        "gmacs": macs.gmacs,
                        "gmacs_paper": macs.gmacs_paper,
                        "batch": batch,
                        "seconds": taken[name, keep],
                        "fewer_gmacs": dense.gmacs / macs.gmacs,
                        "faster": taken[DENSE] / taken[name, keep],
                    }
                )
    return sorted(rows, key=lambda row: (row["layer"], -row["keep"], row["method"]))


@torch.no_grad()
def one_by_one(tower: ImageTower, image: Tensor, layer: int, removed: Tensor) -> Tensor:
    """The feature costs [1,W] of windows, bool [W,N], removed from a picture [1,3,S,S]: a whole pass for every one."""
    kept = [(~window).nonzero().T for window in removed]
    towers = [ReducedTower(tower, {layer: lambda x, context, own=own: context.select(x, own)}) for own in kept]
    return removal_costs("feature", tower(image), torch.stack([reduced(image) for reduced in towers], dim=1))


def golden(tower: ImageTower, layer: int, pictures: int, every: int, rounds: int) -> dict[str, Any]:
    """One picture's golden ranking (feature preservation, sliding windows of 2x2): ours, and a pass for every variant.

    pictures: how many are ranked together; times are of one.  every: one in so many windows is timed alone.
    """
    size = tower.image_size
    images = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(0))
    windows = grid_blocks(tower.grid, 2)
    alone = ReducedTower(tower, {layer: lambda x, c: c.select(x, torch.arange(tower.grid**2 - 4).expand(len(x), -1))})
    timed = windows[::every]
    ours, slow = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        found = golden_ranking(tower, images, prune_layer=layer).scores
        middle = time.perf_counter()
        costs = one_by_one(tower, images[:1], layer, timed)
        ours.append((middle - start) / pictures)
        slow.append((time.perf_counter() - middle) / len(timed) * len(windows))
    assert found.isfinite().all() and costs.isfinite().all()
    return {
        "layer": layer,
        "windows": len(windows),
        "timed_alone": len(timed),
        "pictures": pictures,
        "gmacs": golden_macs(tower, layer) / 1e9,
        "gmacs_alone": len(windows) * count_macs(alone, images[:1]).gmacs,
        "seconds": median(ours),
        "seconds_alone": median(slow),
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """All costs with random weights at ViT-B/16, and golden rankings at embedded scale too.

    smoke: the embedded tower in ViT-B/16's place, one keep rate, one round.
    """
    stated = conditions("paper and embedded", seeds=None, dtype="float32", weights="random; committed")
    small = models()[0].image_tower
    if smoke:
        tower, name, keeps, batches = small, "embedded", (0.6,), {True: 1, False: 1}
    else:
        tower, name = BASELINES[TEACHER].build().image_tower, "ViT-B/16, random weights"
        keeps, batches = KEEPS, {True: 8, False: 2}
    dense = count_macs(tower, torch.zeros(1, 3, tower.image_size, tower.image_size))
    return {
        "name": "patchrank-costs",
        "conditions": stated,
        "model": name,
        "dense": {"gmacs": dense.gmacs, "gmacs_paper": dense.gmacs_paper},
        "rows": pruning(tower, keeps, batches, 1 if smoke else 2),
        "golden": {
            name: golden(tower, 3, 1, SAMPLE, 1),
            "embedded, committed weights": golden(small, 1, 2 if smoke else 64, 1, 1 if smoke else 5),
        },
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    dense, stated = result["dense"], result["conditions"]
    lines = [
        "| before block | keep | method | GMACs | without attention products | batch | s a batch "
        "| fewer GMACs | faster | of that |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| | 1.0 | {DENSE} | {dense['gmacs']:.4g} | {dense['gmacs_paper']:.4g} | | | 1.00 x | 1.00 x | |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['layer']} | {row['keep']} | {row['method']} | {row['gmacs']:.4g} | {row['gmacs_paper']:.4g} "
            f"| {row['batch']} | {row['seconds']:.4g} | {row['fewer_gmacs']:.2f} x | {row['faster']:.2f} x "
            f"| {100 * row['faster'] / row['fewer_gmacs']:.0f} % |"
        )
    lines += [
        "",
        "| golden ranking of one picture | before block | variants | GMACs | as a pass each | s | as a pass each "
        "| fewer GMACs | faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in result["golden"].items():
        lines.append(
            f"| {name} | {found['layer']} | {found['windows']} | {found['gmacs']:.4g} | {found['gmacs_alone']:.4g} "
            f"| {found['seconds']:.4g} | {found['seconds_alone']:.4g} "
            f"| {found['gmacs_alone'] / found['gmacs']:.2f} x | {found['seconds_alone'] / found['seconds']:.2f} x |"
        )
    sampled = [
        f"{found['timed_alone']} of {found['windows']} variants ({name})" for name, found in result["golden"].items()
    ]
    together = [f"{found['pictures']} ({name})" for name, found in result["golden"].items()]
    note = (
        f"Image tower of {result['model']}; {stated['dtype']}, {stated['device']}, {stated['threads']} threads, "
        "medians of alternating rounds. *Given scores* is pruning alone, as for random and golden orders; each "
        "method's own scoring is in its numbers. ToMe merges the same number in every block, so many that as many "
        "tokens are gone over all blocks. A-ViT's cost depends on the picture, so it is measured where it is trained. "
        "Golden rankings: feature preservation, sliding windows of 2x2, one round; a pass each is the whole tower at "
        "batch 1 for every "
        f"variant, timed on {', '.join(sampled)}; pictures ranked together: {', '.join(together)}."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"patchrank-costs": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    """How much faster each method is, against how many fewer multiply-adds it needs."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == name]
        axes.plot([row["fewer_gmacs"] for row in rows], [row["faster"] for row in rows], "o", markersize=4, label=name)
    most = max(row["fewer_gmacs"] for row in result["rows"])
    axes.plot([1, most], [1, most], "k:", linewidth=1, label="time follows multiply-adds")
    axes.set(title=result["model"], xlabel="fewer GMACs, times", ylabel="faster, times")
    axes.legend(fontsize=7)
    return figure

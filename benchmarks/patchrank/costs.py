"""Patch Ranking's costs: every method's multiply-adds and time by keep rate at ViT-B/16, and a golden ranking's.

Shapes: B images, N patch tokens, S image size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.cells import Comparison, Result
from benchmarks.embedded import models
from benchmarks.patchrank.tasks import PRUNE_LAYER
from benchmarks.printed import paper_numbers
from benchmarks.timing import alternate, ratio
from benchmarks.waveclip.rivals import BASELINES, TEACHER
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
TIMED_LAYER = 3
"""Golden rankings are counted at all of these layers, and timed at this one."""
DENSE, PREDICTOR = "all tokens", "Patch Ranking"
SAMPLE = 13
"""Of ViT-B/16's 169 windows, every so many-th is timed alone; all would take a minute."""
FOLLOWS = 0.9
"""The share of the saved multiply-adds that Patch Ranking is to save in time, at every layer and keep rate."""


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


@torch.no_grad()
def pruning(
    tower: ImageTower, keeps: Sequence[float], batches: Mapping[bool, int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each layer, keep rate and method, and what it saves against all tokens, in GMACs and in time.

    batches: images in a timed batch of the predictor (True), which has to keep the rule of ``FOLLOWS``, and of the
        others (False).
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
            taken = alternate({key: partial(model, some) for key, model in calls.items()}, rounds)
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
                        "seconds": taken[name, keep]["seconds"],
                        "fewer_gmacs": dense.gmacs / macs.gmacs,
                        "faster": ratio(taken[DENSE], taken[name, keep]),
                    }
                )
    return sorted(rows, key=lambda row: (row["layer"], -row["keep"], row["method"]))


@torch.no_grad()
def one_by_one(tower: ImageTower, image: Tensor, layer: int, removed: Tensor) -> Tensor:
    """The feature costs [1,W] of windows, bool [W,N], removed from a picture [1,3,S,S]: a whole pass for every one."""
    kept = [(~window).nonzero().T for window in removed]
    towers = [ReducedTower(tower, {layer: lambda x, context, own=own: context.select(x, own)}) for own in kept]
    return removal_costs("feature", tower(image), torch.stack([reduced(image) for reduced in towers], dim=1))


def golden_cost(tower: ImageTower, layer: int) -> dict[str, Any]:
    """What a golden ranking (sliding windows of 2x2, one round) counts, and a whole pass for every variant."""
    windows, picture = len(grid_blocks(tower.grid, 2)), torch.zeros(1, 3, tower.image_size, tower.image_size)
    left = torch.arange(tower.grid**2 - 4)[None]
    alone = count_macs(ReducedTower(tower, {layer: lambda x, context: context.select(x, left)}), picture)
    return {
        "layer": layer,
        "windows": windows,
        "gmacs": golden_macs(tower, layer) / 1e9,
        "gmacs_paper": golden_macs(tower, layer, attention=False) / 1e9,
        "gmacs_alone": windows * alone.gmacs,
    }


def golden_time(tower: ImageTower, layer: int, pictures: int, every: int, rounds: int, least: float) -> dict[str, Any]:
    """Seconds of one picture's golden ranking (feature preservation): ours, and a pass for every variant.

    pictures: how many are ranked together; times are of one.  every: one in so many windows is timed alone.
    least: how many times as fast ours is to be.
    """
    size = tower.image_size
    images = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(0))
    windows = grid_blocks(tower.grid, 2)
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
        "timed_alone": len(timed),
        "pictures": pictures,
        "seconds": median(ours),
        "seconds_alone": median(slow),
        "faster": median(alone / together for alone, together in zip(slow, ours, strict=True)),
        "least": least,
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """All costs with random weights at ViT-B/16, and golden rankings at embedded scale too.

    smoke: the embedded tower in ViT-B/16's place, one keep rate, one round.
    """
    stated = conditions("paper and embedded", seeds=None, dtype="float32", weights="random; committed")
    small = models()[0].image_tower
    if smoke:
        tower, name, keeps, batches, rounds = small, "embedded", (0.6,), {True: 1, False: 1}, 1
    else:
        tower, name = BASELINES[TEACHER].build().image_tower, "ViT-B/16, random weights"
        keeps, batches, rounds = KEEPS, {True: 6, False: 1}, 3
    dense = count_macs(tower, torch.zeros(1, 3, tower.image_size, tower.image_size))
    large = [{"model": name, **golden_cost(tower, layer)} for layer in LAYERS]
    large[LAYERS.index(TIMED_LAYER)] |= golden_time(tower, TIMED_LAYER, 1, SAMPLE, 1, 1.6)
    timed = golden_time(small, PRUNE_LAYER, 2 if smoke else 64, 1, 1 if smoke else 5, 8.0)
    return {
        "name": "patchrank-costs",
        "conditions": stated,
        "model": name,
        "rounds": rounds,
        "dense": {"gmacs": dense.gmacs, "gmacs_paper": dense.gmacs_paper},
        "rows": pruning(tower, keeps, batches, rounds),
        "golden": [*large, {"model": "embedded, committed weights", **golden_cost(small, PRUNE_LAYER), **timed}],
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
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
    timed = [found for found in result["golden"] if "seconds" in found]
    sampled = [f"{found['timed_alone']} of {found['windows']} variants ({found['model']})" for found in timed]
    together = [f"{found['pictures']} ({found['model']})" for found in timed]
    note = (
        f"Image tower of {result['model']}; {stated['dtype']}, {stated['device']}, {stated['threads']} threads, "
        f"medians of {result['rounds']} alternating rounds. *Given scores* is pruning alone, as for random and golden "
        "orders; each method's own scoring is in its numbers. ToMe merges the same number in every block, so many that "
        "as many tokens are gone over all blocks. A-ViT's cost depends on the picture, so it is measured where it is "
        "trained. "
        "Golden rankings: feature preservation, sliding windows of 2x2, one round; a pass each is the whole tower at "
        "batch 1 for every "
        f"variant, timed on {', '.join(sampled)}; pictures ranked together: {', '.join(together)}."
    )
    said = [f"- {line}" for line in verdicts(result)]
    parts = [lines, _golden_lines(result["golden"]), said, [note]]
    return {
        "md": "\n\n".join("\n".join(part) for part in parts) + "\n",
        "figures": {"patchrank-costs": _draw(result)},
    }


def _golden_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| golden ranking of one picture | before block | variants | GMACs | without attention products "
        "| GMACs, a pass each | fewer GMACs | s | s, a pass each | faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        taken = ["counted alone", "", ""]
        if "seconds" in row:
            taken = [f"{row['seconds']:.4g}", f"{row['seconds_alone']:.4g}", f"{row['faster']:.2f} x"]
        cells = [row["model"], row["layer"], row["windows"]]
        cells += [f"{row[cost]:.4g}" for cost in ("gmacs", "gmacs_paper", "gmacs_alone")]
        cells += [f"{row['gmacs_alone'] / row['gmacs']:.2f} x", *taken]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Whether the times are what was asked of them, a sentence for each demand."""
    ours = [row for row in result["rows"] if row["method"] == PREDICTOR]
    shares = {(row["layer"], row["keep"]): row["faster"] / row["fewer_gmacs"] for row in ours}
    missed = [f"block {layer}, keep {keep}" for (layer, keep), share in shares.items() if share < FOLLOWS]
    found = [
        f"{PREDICTOR} at batch {ours[0]['batch']}, its predictor included: dense time / pruned time is at least "
        f"{FOLLOWS} x dense GMACs / pruned GMACs: {_verdict(not missed)}, by {len(ours) - len(missed)} of {len(ours)} "
        f"rows, the least {min(shares.values()):.2f} x{'; missed at ' + ', '.join(missed) if missed else ''}."
    ]
    for of in result["golden"]:
        if "seconds" in of:
            found.append(
                f"Golden ranking, {of['model']}, before block {of['layer']}: at least {of['least']} x as fast as a "
                f"pass for every variant: {_verdict(of['faster'] >= of['least'])}, {of['faster']:.2f} x."
            )
    return found


def _verdict(kept: bool) -> str:
    return "**met**" if kept else "**not met**"


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


def compare(result: Result) -> Iterator[Comparison]:
    """What all of Patch Ranking's rows are said to cost, beside a tower with all tokens, and one with 60 % of them."""
    printed = paper_numbers("patchrank")["gflops"]
    (pruned,) = (r for r in result["rows"] if (r["layer"], r["keep"], r["method"]) == (3, 0.6, "Patch Ranking"))
    for row, what in ((result["dense"], "all tokens"), (pruned, "60 % of the patches from block 3 on")):
        for account, said in (("gmacs", "with attention's products"), ("gmacs_paper", "without")):
            yield Comparison(f"all rows of its table, ours with {what}, {said}", printed, row[account], "GMACs")

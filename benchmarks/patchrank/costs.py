"""Patch Ranking's costs at ViT-B/16: multiply-adds and time of every method by keep rate, and of a golden ranking.

Shapes: W windows of patches, N patch tokens, S image size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.cells import Comparison, Result, table
from benchmarks.patchrank.methods import DENSE, OURS, methods, remark
from benchmarks.patchrank.tasks import PRUNE_LAYER, SHAPES
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from benchmarks.statistics import median_interval
from common.clip import CLIP
from common.conditions import conditions
from common.flops import count_macs
from common.reducer_registry import REVISION
from common.reduction import ReducedTower
from common.timing import alternate, rounds_ratio
from common.tower import ImageTower
from patchrank.golden import golden_macs, golden_ranking
from patchrank.scores import grid_blocks, removal_costs

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
LAYERS = (0, 3)
TIMED_LAYER = 3
"""Golden rankings are counted at all of these layers, and timed at this one."""
SAMPLE = 13
"""One in so many of ViT-B/16's 169 windows is timed alone; all of them would take a minute."""
FOLLOWS = 0.9
"""Patch Ranking's speed-up must reach this share of its reduction of multiply-adds, at every layer and keep rate."""


@torch.no_grad()
def pruning(tower: ImageTower, keeps: Sequence[float], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each layer, keep rate and method, with the GMACs and the time that it saves against all tokens.

    batch: images in a timed batch.  "faster" holds the speed-up of each round.
    """
    size = tower.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense = count_macs(tower, images[:1])
    rows = []
    for layer in LAYERS:
        built = {(name, keep): model for keep in keeps for name, model in methods(tower, keep, layer).items()}
        calls = {key: partial(model, images) for key, model in {DENSE: tower, **built}.items()}
        times = alternate(calls, rounds)
        for (name, keep), model in built.items():
            macs = count_macs(model, images[:1])
            rows.append(
                {
                    "layer": layer,
                    "keep": keep,
                    "method": name,
                    "gmacs": macs.gmacs,
                    "gmacs_paper": macs.gmacs_paper,
                    "seconds": times[name, keep]["seconds"],
                    "fewer_gmacs": dense.gmacs / macs.gmacs,
                    "faster": rounds_ratio(times[DENSE], times[name, keep]),
                }
            )
    return sorted(rows, key=lambda row: (row["layer"], -row["keep"], row["method"]))


@torch.no_grad()
def one_by_one(tower: ImageTower, image: Tensor, layer: int, removed: Tensor) -> Tensor:
    """Feature costs [1,W] of removing each window, bool [W,N], from a picture [1,3,S,S], by one whole pass each."""
    kept = [(~window).nonzero().T for window in removed]
    towers = [ReducedTower(tower, {layer: lambda x, context, left=left: context.select(x, left)}) for left in kept]
    return removal_costs("feature", tower(image), torch.stack([reduced(image) for reduced in towers], dim=1))


def golden_cost(tower: ImageTower, layer: int) -> dict[str, Any]:
    """GMACs of a golden ranking (sliding windows of 2x2, one round), and those of a whole pass for every variant."""
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
    """Seconds of one picture's golden ranking (feature preservation): ours, and by a pass for every variant.

    pictures: how many are ranked together; times are of one.  every: one in so many windows is timed alone.
    least: the speed-up that ours must reach.
    """
    size = tower.image_size
    images = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(0))
    windows = grid_blocks(tower.grid, 2)
    timed = windows[::every]
    ours, slow = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        scores = golden_ranking(tower, images, prune_layer=layer).scores
        middle = time.perf_counter()
        costs = one_by_one(tower, images[:1], layer, timed)
        ours.append((middle - start) / pictures)
        slow.append((time.perf_counter() - middle) / len(timed) * len(windows))
    assert scores.isfinite().all() and costs.isfinite().all()
    return {
        "timed_alone": len(timed),
        "pictures": pictures,
        "seconds": median(ours),
        "seconds_alone": median(slow),
        "faster": median(alone / together for alone, together in zip(slow, ours, strict=True)),
        "least": least,
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """All costs at ViT-B/16 with random weights, and golden rankings at embedded scale too.

    smoke: the embedded tower instead of ViT-B/16, one keep rate, one round.
    """
    setting = conditions(
        "paper and embedded", seeds=None, dtype="float32", weights="random; committed", reducers=REVISION
    )
    small = SHAPES.clip().image_tower
    if smoke:
        tower, name, keeps, batch, rounds = small, "embedded", (0.6,), 1, 1
    else:
        tower, name = CLIP.from_open_clip("ViT-B-16-quickgelu").eval().image_tower, "ViT-B/16, random weights"
        keeps, batch, rounds = KEEPS, 6, 5
    dense = count_macs(tower, torch.zeros(1, 3, tower.image_size, tower.image_size))
    large = [{"model": name, **golden_cost(tower, layer)} for layer in LAYERS]
    large[LAYERS.index(TIMED_LAYER)] |= golden_time(tower, TIMED_LAYER, 1, SAMPLE, 1, 1.6)
    timed = golden_time(small, PRUNE_LAYER, 2 if smoke else 64, 1, 1 if smoke else 5, 8.0)
    return {
        "name": "patchrank-costs",
        "conditions": setting,
        "model": name,
        "rounds": rounds,
        "batch": batch,
        "dense": {"gmacs": dense.gmacs, "gmacs_paper": dense.gmacs_paper},
        "rows": pruning(tower, keeps, batch, rounds),
        "golden": [*large, {"model": "embedded, committed weights", **golden_cost(small, PRUNE_LAYER), **timed}],
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    setting = result["conditions"]
    timed = [row for row in result["golden"] if "seconds" in row]
    sampled = [f"{row['timed_alone']} of {row['windows']} variants ({row['model']})" for row in timed]
    together = [f"{row['pictures']} ({row['model']})" for row in timed]
    note = (
        f"Image tower of {result['model']}; {setting['dtype']}, {setting['device']}, {setting['threads']} threads, "
        f"medians of {result['rounds']} alternating rounds, batch {result['batch']}. *Given scores* is pruning alone, "
        "as for random and golden orders; each method's own scoring is in its numbers. ToMe merges the same number in "
        "every block, so many that "
        "as many tokens are gone over all blocks. A-ViT's cost depends on the picture, so it is measured where it is "
        "trained. "
        "Golden rankings: feature preservation, sliding windows of 2x2, one round; a pass each is the whole tower at "
        "batch 1 for every "
        f"variant, timed on {', '.join(sampled)}; pictures ranked together: {', '.join(together)}.{remark(setting)}"
    )
    demands = "\n".join(f"- {line}" for line in verdicts(result))
    parts = [_pruning_table(result), _golden_table(result["golden"]), demands, note]
    return {"md": "\n\n".join(parts) + "\n", "figures": {benchmark("patchrank-costs").stem(result): _draw(result)}}


def compare(result: Result) -> Iterator[Comparison]:
    """The one GFLOPs figure of the paper's table, beside a tower with all tokens and one with 60 % of them."""
    printed = paper_numbers("patchrank")["gflops"]
    (pruned,) = (r for r in result["rows"] if (r["layer"], r["keep"], r["method"]) == (3, 0.6, OURS))
    for row, what in ((result["dense"], "all tokens"), (pruned, "60 % of the patches from block 3 on")):
        for count, products in (("gmacs", "with attention's products"), ("gmacs_paper", "without")):
            yield Comparison(f"all rows of its table, ours with {what}, {products}", printed, row[count], "GMACs")


def _pruning_table(result: Result) -> str:
    head = ["before block", "keep", "method", "GMACs", "without attention products", "s a batch"]
    dense = [f"{result['dense'][count]:.4g}" for count in ("gmacs", "gmacs_paper")]
    rows = [["", "1.0", DENSE, *dense, "", "1.00 x", "1.00 x", ""]]
    for row in result["rows"]:
        cells = [row["layer"], row["keep"], row["method"], f"{row['gmacs']:.4g}", f"{row['gmacs_paper']:.4g}"]
        middle, low, high = _faster(row)
        cells += [f"{row['seconds']:.4g}", f"{row['fewer_gmacs']:.2f} x", f"{middle:.2f} x [{low:.2f}, {high:.2f}]"]
        rows.append([*cells, f"{100 * middle / row['fewer_gmacs']:.0f} %"])
    return table([*head, "fewer GMACs", "faster [95 %]", "of that"], rows, left=(2,))


def _faster(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """The median speed-up of a row's rounds, with its interval."""
    return (median(row["faster"]), *median_interval(row["faster"]))


def _golden_table(golden: Sequence[Mapping[str, Any]]) -> str:
    head = ["golden ranking of one picture", "before block", "variants", "GMACs", "without attention products"]
    rows = []
    for row in golden:
        cells = [row["model"], row["layer"], row["windows"]]
        cells += [f"{row[count]:.4g}" for count in ("gmacs", "gmacs_paper", "gmacs_alone")]
        times = ["counted alone", "", ""]
        if "seconds" in row:
            times = [f"{row['seconds']:.4g}", f"{row['seconds_alone']:.4g}", f"{row['faster']:.2f} x"]
        rows.append([*cells, f"{row['gmacs_alone'] / row['gmacs']:.2f} x", *times])
    return table([*head, "GMACs, a pass each", "fewer GMACs", "s", "s, a pass each", "faster"], rows)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Whether each demand on the times is met: one sentence for each. A speed-up counts by its interval's lower end.

    Where all medians reach what some lower ends miss, the demand is not shown to be met.
    """
    ours = [row for row in result["rows"] if row["method"] == OURS]
    reached = all(_faster(row)[0] >= FOLLOWS * row["fewer_gmacs"] for row in ours)
    shares = {(row["layer"], row["keep"]): _faster(row)[1] / row["fewer_gmacs"] for row in ours}
    missed = [f"block {layer}, keep {keep}" for (layer, keep), share in shares.items() if share < FOLLOWS]
    sentences = [
        f"{OURS}, its predictor included: dense time / pruned time is surely at least "
        f"{FOLLOWS} x dense GMACs / pruned GMACs: {_verdict(not missed, reached)}, by {len(ours) - len(missed)} of "
        f"{len(ours)} rows, the least lower end {min(shares.values()):.2f} x"
        f"{'; missed at ' + ', '.join(missed) if missed else ''}."
    ]
    for row in result["golden"]:
        if "seconds" in row:
            sentences.append(
                f"Golden ranking, {row['model']}, before block {row['layer']}: at least {row['least']} x as fast as a "
                f"pass for every variant: {_verdict(row['faster'] >= row['least'])}, {row['faster']:.2f} x."
            )
    return sentences


def _verdict(met: bool, reached: bool = False) -> str:
    """reached: by the medians."""
    return "**met**" if met else "**not shown** (all medians reach it)" if reached else "**not met**"


def _draw(result: dict[str, Any]) -> Figure:
    """Each method's speed-up against its reduction of multiply-adds."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == name]
        fewer, faster = [row["fewer_gmacs"] for row in rows], [_faster(row)[0] for row in rows]
        axes.plot(fewer, faster, "o", markersize=4, label=name)
    most = max(row["fewer_gmacs"] for row in result["rows"])
    axes.plot([1, most], [1, most], "k:", linewidth=1, label="time follows multiply-adds")
    axes.set(title=result["model"], xlabel="fewer GMACs, times", ylabel="faster, times")
    axes.legend()
    return figure

"""Every token reducer at ViT-B/16: multiply-adds, and images per second beside the whole tower in the same rounds.

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.cells import table
from benchmarks.registry import benchmark
from benchmarks.statistics import median_interval
from common.clip import CLIP
from common.conditions import conditions
from common.flops import count_macs
from common.reducer_registry import installed_reducers, setting_for
from common.reduction import ReducedTower
from common.timing import alternate, rounds_ratio
from common.tower import ImageTower

KEEP, LAYER = 0.6, 3
"""The share of the patches that stay, and the block from which on."""
CLASSES = 1000
"""Random texts for a reducer that chooses by them, as many as ImageNet has names."""
BATCHES, ROUNDS = (1, 8), 7
WHOLE = "whole tower"


def reduced(tower: ImageTower, keep: float, layer: int) -> tuple[dict[str, ReducedTower], dict[str, str]]:
    """A tower for each installed reducer, by name; and for those that cannot work in this tower, why.

    Half resolution keeps a quarter, whatever ``keep`` is. A trained reducer has untrained modules: they cost the same.
    """
    texts = torch.randn(CLASSES, tower.embed_dim, generator=torch.Generator().manual_seed(0))
    towers, reasons = {}, {}
    for name, entry in sorted(installed_reducers().items()):
        sizes = tower.width, len(tower.transformer.resblocks), tower.grid**2
        modules = entry.untrained(*sizes) if entry.untrained else None
        setting = setting_for(tower, entry.rate(keep), layer, texts=texts)._replace(trained=modules)
        try:
            towers[name] = ReducedTower(tower, entry.reducers(setting)).eval()
        except ValueError as error:
            reasons[name] = str(error)
    return towers, reasons


@torch.no_grad()
def measure(
    tower: ImageTower, towers: Mapping[str, nn.Module], batches: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for the whole tower and each of ``towers``: GMACs of an image, and at each batch size the rounds' times.

    In every round all towers run in turn, so that other load on the machine falls on all of them alike.
    """
    size = tower.image_size
    images = torch.randn(max(batches), 3, size, size, generator=torch.Generator().manual_seed(0))
    models = {WHOLE: tower, **towers}
    rows = []
    for name, model in models.items():
        macs = count_macs(model, images[:1])
        rows.append({"reducer": name, "gmacs": macs.gmacs, "gmacs_paper": macs.gmacs_paper, "batches": {}})
    for batch in batches:
        times = alternate({name: partial(model, images[:batch]) for name, model in models.items()}, rounds)
        for row in rows:
            measured = times[row["reducer"]]
            row["batches"][str(batch)] = {
                "images_per_second": batch / measured["seconds"],
                "faster": rounds_ratio(times[WHOLE], measured),
            }
    return rows


def run(smoke: bool = False) -> dict[str, Any]:
    """All reducers at ViT-B/16 with random weights, 224 px.  smoke: a tower of 32 px, one round."""
    setting = conditions("paper", seeds=None, dtype="float32", weights="random")
    if smoke:
        tower, name, layer, rounds = CLIP.tiny().eval().image_tower, "a tower of 2 blocks, 32 px", 0, 1
    else:
        tower = CLIP.from_open_clip("ViT-B-16-quickgelu").eval().image_tower
        name, layer, rounds = "ViT-B/16, 224 px, random weights", LAYER, ROUNDS
    towers, reasons = reduced(tower, KEEP, layer)
    rows = measure(tower, towers, BATCHES, rounds)
    return {
        "name": "reducer-costs",
        "conditions": setting | {"rounds": rounds},
        "model": name,
        "keep": KEEP,
        "layer": layer,
        "rows": rows,
        "reasons": reasons,
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows, setting = result["rows"], result["conditions"]
    whole = rows[0]
    batches = list(whole["batches"])
    head = ["reducer", "GMACs", "without attention products", "fewer GMACs"]
    head += [column for batch in batches for column in (f"images/s, batch {batch}", "faster [95 %]")]
    cells = []
    for row in rows:
        name = row["reducer"] if row is whole else f"`{row['reducer']}`"
        line = [name, f"{row['gmacs']:.4g}", f"{row['gmacs_paper']:.4g}", f"{whole['gmacs'] / row['gmacs']:.2f} x"]
        for batch in batches:
            speed = row["batches"][batch]
            line += [f"{speed['images_per_second']:.4g}", "–" if row is whole else _ratio(speed["faster"])]
        cells.append(line)
    cells += [[f"`{name}`", *["–"] * (len(head) - 1)] for name in result["reasons"]]
    trained = {name for name, entry in installed_reducers().items() if entry.untrained}
    timed = trained & {row["reducer"] for row in rows}
    random_weights = "; what is trained has random weights" if timed else ""
    note = (
        f"Image tower of {result['model']}; {100 * result['keep']:.0f} % of the patches from block {result['layer']} "
        f"on, half resolution a quarter{random_weights}; {setting['dtype']}, {setting['device']}, "
        f"{setting['threads']} threads. In each of {setting['rounds']} rounds all towers ran in turn; speeds are "
        "medians, “faster” is the median of the rounds' ratios to the whole tower, with its bootstrap interval."
    )
    failed = "\n".join(f"- `{name}` did not run: {reason}" for name, reason in result["reasons"].items())
    parts = [table(head, cells), *([failed] if failed else []), note]
    return {"md": "\n\n".join(parts) + "\n", "figures": {benchmark("reducer-costs").stem(result): _draw(result)}}


def _ratio(ratios: Sequence[float]) -> str:
    low, high = median_interval(ratios)
    return f"{median(ratios):.2f} x [{low:.2f}, {high:.2f}]"


def _draw(result: dict[str, Any]) -> Figure:
    """Each reducer's speed-up against its reduction of multiply-adds, a panel for each batch size."""
    whole, *rows = result["rows"]
    batches = list(whole["batches"])
    figure = Figure(figsize=(5.5 * len(batches), 5), layout="constrained")
    for column, batch in enumerate(batches):
        axes = figure.add_subplot(1, len(batches), column + 1)
        fewer = [whole["gmacs"] / row["gmacs"] for row in rows]
        faster = [median(row["batches"][batch]["faster"]) for row in rows]
        axes.plot(fewer, faster, "o", markersize=4)
        for row, x, y in zip(rows, fewer, faster, strict=True):
            axes.annotate(row["reducer"], (x, y), (3, 3), textcoords="offset points", fontsize=7)
        ends = [1, max([1, *fewer])]
        axes.plot(ends, ends, "k:", linewidth=1, label="time follows multiply-adds")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set(title=f"batch {batch}", xlabel="fewer GMACs, times", ylabel="faster, times")
        axes.legend()
    figure.suptitle(result["model"])
    return figure

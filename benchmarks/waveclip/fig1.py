"""WAVECLIP's Figure 1: accuracy against multiply-adds, the embedded curve beside the paper's points.

Shapes: M images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import read_log
from benchmarks.cells import Comparison, Result, accuracy, table
from benchmarks.embedded import models
from benchmarks.figures import COLOURS
from benchmarks.printed import paper_numbers
from benchmarks.statistics import mean_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.waveclip import controls, shapes
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.sweep import examples, margins, sweep

PLACES = {
    "CLIP ViT-B/16": ((0, 5), "center"),
    "TinyCLIP": ((6, -3), "left"),
    "WAVECLIP-low": ((7, -3), "left"),
    "WAVECLIP-mid": ((7, -3), "left"),
    "WAVECLIP-high": ((0, 6), "right"),
}
"""Where names stand from their points on the right panel, in points of type; the others to the left."""
FLOOR = 61
"""The lowest accuracy of the right panel; points below it are named at its edge."""


TEXT = {"textcoords": "offset points", "fontsize": 8}
"""How names are written beside what they name."""


def run(smoke: bool = False) -> dict[str, Any]:
    """The margin gate's curve over all thresholds on ``test``, the teacher's point, and the paper's points.

    The report page's slider reads ``sweep``, ``margins`` and ``examples``, which are of seed 0.  smoke: few resamples.
    """
    price, seeds = shapes.prices(), shapes.controlled("test")
    first = seeds[0].wave
    resamples = 20 if smoke else controls.CURVE_RESAMPLES
    line = controls.curve([seen.wave for seen in seeds], [gmacs for _, gmacs in price.steps(controls.WAVE)], resamples)
    printed = paper_numbers("waveclip")
    return {
        "name": "waveclip-fig1",
        "conditions": shapes.conditions_of_a_sweep(len(seeds)),
        "pictures": len(first.reference),
        "teacher": _point(price.dense, [first.reference]),
        "half": _point(price.half, [seen.cascade.first for seen in seeds]),
        "frontier": [dict(zip(line, values, strict=True)) for values in zip(*line.values(), strict=True)],
        "paper": [
            {key: row[key] for key in ("method", "gflops", "accuracy", "refined") if key in row}
            for row in printed["table2"] + printed["prose"]
        ],
        "sweep": sweep(first, price.wave),
        "margins": margins(first),
        "examples": examples(*models()),
    }


def _point(cost: Cost, right: Sequence[np.ndarray]) -> dict[str, float]:
    """A model's cost, and its accuracy with the interval's ends. right: bool [M] of each training seed."""
    middle, low, high = mean_interval(np.stack(right)).ends
    return {"gmacs": cost.macs.gmacs, "accuracy": middle, "low": low, "high": high}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    points, dense = result["frontier"], result["teacher"]
    rows = [
        [
            f"{100 * point['refined']:.0f} %",
            f"{point['gmacs']:.4f}",
            accuracy(point["accuracy"], [point["low"], point["high"]]),
            f"{100 * point['gmacs'] / dense['gmacs']:.0f} %",
        ]
        for point in points[:: max(1, len(points) // 10)]
    ]
    run = result["conditions"]
    curve = table(["refined", "GMACs", "accuracy [95 %]", "of the teacher's GMACs"], rows, left=())
    note = (
        f"Embedded scale: the margin gate swept over all thresholds on {result['pictures']:,} test pictures of the "
        f"scenes of shape, {run['seeds']} training seeds; the dense teacher, one training, has "
        f"{100 * dense['accuracy']:.1f} at {dense['gmacs']:.4f} GMACs. Intervals resample seeds and pictures."
        f"{read_log.remark(run)} "
        "Paper scale: the printed points, whose GFLOPs mix two accounts (see Table 2). "
        "The two panels share no axis."
    )
    return {"md": f"{curve}\n\n{sentence()}\n\n{note}\n", "figures": {"waveclip-fig1": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    ours, printed = figure.subplots(1, 2)
    _draw_ours(ours, result)
    _draw_printed(printed, result["paper"])
    return figure


def _draw_ours(axes: Axes, result: dict[str, Any]) -> None:
    line = {name: [point[name] for point in result["frontier"]] for name in result["frontier"][0]}
    controls.draw_curve(axes, line, "WaveCLIP")
    place = len(line["gmacs"]) // 2
    below = {"color": COLOURS[0], "ha": "right", "va": "top"}
    axes.annotate("WaveCLIP, margin gate", (line["gmacs"][place], 100 * line["low"][place]), (0, -6), **TEXT, **below)
    singles = (("teacher", "*", "dense teacher", -7, "right"), ("half", "s", "half-resolution CLIP", 7, "left"))
    for model, mark, name, offset, side in singles:
        point = result[model]
        middle, low, high = (100 * point[end] for end in ("accuracy", "low", "high"))
        axes.errorbar(point["gmacs"], middle, [[middle - low], [high - middle]], fmt=f"k{mark}", capsize=3)
        axes.annotate(name, (point["gmacs"], middle), (offset, 0), ha=side, va="center", **TEXT)
    axes.set(title=f"scenes of shape, measured, {result['conditions']['seeds']} seeds")
    axes.set(xlabel="GMACs a picture", ylabel="top-1, %")


def _draw_printed(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for wave, style in ((True, "o-"), (False, "ks")):
        own = [row for row in rows if row["method"].startswith("WAVECLIP") is wave]
        places = sorted((row["gflops"], row["accuracy"]) for row in own)
        axes.plot(*zip(*places, strict=True), style, markersize=5)
    for row in rows:
        name = row["method"].split(" (")[0]
        if row["accuracy"] < FLOOR:
            below = f"{name}: {row['accuracy']} at {row['gflops']}, below"
            axes.annotate(below, (1.2, FLOOR + 0.2), (6, 4), **TEXT)
        elif name in PLACES or not name.startswith("WAVECLIP"):
            # Away from WAVECLIP's line, which rises from the left.
            offset, side = PLACES.get(name, ((-6, -3), "right"))
            colour = COLOURS[0] if name.startswith("WAVECLIP") else "black"
            axes.annotate(name, (row["gflops"], row["accuracy"]), offset, ha=side, color=colour, **TEXT)
    axes.set(xlim=(1, 18.5), ylim=(FLOOR, 67))
    axes.set(title="ImageNet-1k, as the paper prints it", xlabel="GFLOPs as printed", ylabel="top-1, %")


def compare(result: Result) -> Iterator[Comparison]:
    """The distance of each printed operating point from its teacher, and ours at the nearest share."""
    dense = next(row["accuracy"] for row in result["paper"] if row["method"] == "CLIP ViT-B/16")
    for row in result["paper"]:
        if row.get("refined") is not None:
            nearest = min(result["frontier"], key=lambda point: abs(point["refined"] - row["refined"]))
            ours = 100 * (nearest["accuracy"] - result["teacher"]["accuracy"])
            yield Comparison(f"{row['method']} against its teacher", row["accuracy"] - dense, ours, "points", False)

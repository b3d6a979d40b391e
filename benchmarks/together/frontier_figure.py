"""The frontier as a picture: accuracy against multiply-adds and against measured time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.together.compositions import DENSE
from benchmarks.waveclip.controls import CASCADE, HALF, LATER_WAVE, TRAINED_ON, WAVE

SHOWN = 0.12
"""How far below the dense teacher the figure reaches; lower points are named at its edge."""
NAMES_APART = 0.025
"""The least distance of two names at the edge, as a share of the axis."""
CONTROLS = {HALF: "X", CASCADE: "d", TRAINED_ON: "P"}
MARKERS = {DENSE: "*", WAVE: "o", LATER_WAVE: "h", **CONTROLS, "MLIP": "D"}
"""Of whole models, which are black, and controls, which are grey."""
FIRST = WAVE, LATER_WAVE, DENSE, *CONTROLS
"""WaveCLIP and what it is measured by: above all other points, with their intervals, and first in the legend."""
Row = dict[str, Any]


def draw(rows: Sequence[Row]) -> Figure:
    """Both panels. A composition that refines no picture is WaveCLIP itself, and WaveCLIP's point is drawn for both."""
    rows = [row for row in rows if not row["composed"] or row["refined"]]
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    floor = 100 * (rows[0]["accuracy"] - SHOWN)
    for axes, cost, label in (
        (left, "gmacs", "million multiply-adds a picture"),
        (right, "seconds", "ms a picture, measured"),
    ):
        _draw_against(axes, rows, cost, floor)
        axes.set(xlabel=label)
    left.set(ylabel="top-1, %", ylim=(max(floor, left.get_ylim()[0]), None))
    figure.suptitle(f"embedded scale; hollow: dominated; at the lower edge: accuracies below {floor:.0f} %", fontsize=9)
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    names = [*(name for name in FIRST if name in entries), *(name for name in entries if name not in FIRST)]
    figure.legend([entries[name] for name in names], names, loc="outside right center")
    return figure


def _draw_against(axes: Axes, rows: Sequence[Row], cost: str, floor: float) -> None:
    """A line a method: one colour a reducer, black or grey without one, dashed if composed, hollow where dominated.

    The reducers that are the best within no budget are grey points, under all others. A point below
    ``floor`` %, where the axes end, is named there with its accuracy.
    """
    colours: dict[str, str] = {}
    below: list[tuple[float, str, str]] = []
    others = [row for row in rows if not row.get("named", True) and 100 * row["accuracy"] >= floor]
    if others:
        xs, ys = [1000 * row[cost] for row in others], [100 * row["accuracy"] for row in others]
        axes.plot(xs, ys, ".", color="0.75", markersize=4, label="other reducers", zorder=1)
    # What follows a comma in a name stands in the table.
    rows = [row | {"method": row["method"].partition(",")[0]} for row in rows if row.get("named", True)]
    for name in dict.fromkeys(row["method"] for row in rows):
        line = sorted((row for row in rows if row["method"] == name), key=lambda row: row[cost])
        xs, ys = [1000 * row[cost] for row in line], [100 * row["accuracy"] for row in line]
        model, _, reducer = name.rpartition(" + ")
        colour = colours.setdefault(reducer, f"C{len(colours)}") if model else "0.45" if name in CONTROLS else "black"
        composed = line[0]["composed"]
        style = {"color": colour, "linestyle": "--" if composed else "-", "marker": "s" if composed else "o"}
        style |= {} if model else {"marker": MARKERS.get(name, "v")}
        style |= {"markersize": 7 if name in FIRST else 5}
        above = 6 if name == WAVE else 5 if name in FIRST else 4
        axes.plot(xs, ys, linewidth=1.2, label=name, zorder=above if name in FIRST else 2, **style)
        axes.plot(xs, ys, zorder=above, **style | {"linestyle": "none"})  # names at the edge hide lines, no point
        if name in FIRST:
            low, high = zip(*(row["interval"] for row in line), strict=True)
            axes.vlines(xs, [100 * end for end in low], [100 * end for end in high], colour, linewidth=0.8, zorder=4)
        hollow = [(x, y) for x, y, row in zip(xs, ys, line, strict=True) if cost in row["dominated"]]
        inside = {"color": "white", "markersize": style["markersize"] / 2, "marker": style["marker"], "zorder": above}
        axes.plot([x for x, _ in hollow], [y for _, y in hollow], linestyle="none", **inside)
        below += [(x, f"{name}: {y:.1f}", colour) for x, y in zip(xs, ys, strict=True) if y < floor]
    _name_below(axes, below, floor)


def _name_below(axes: Axes, points: Sequence[tuple[float, str, str]], floor: float) -> None:
    """Names of the points below the axes' end, at this end from left to right, none over another.

    points: x, name and colour of each.
    """
    left, right = axes.get_xlim()
    apart, free = NAMES_APART * (right - left), left
    for x, name, colour in sorted(points):
        axes.plot(x, floor, "v", color=colour, markersize=4, clip_on=False)
        edge = {"xytext": (0, 5), "textcoords": "offset points", "rotation": 90, "ha": "center", "fontsize": 6}
        edge |= {"color": colour, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
        axes.annotate(name, (max(x, free), floor), **edge)
        free = max(x, free) + apart

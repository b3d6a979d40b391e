"""How all pictures look: seven colours that the colour-blind can tell apart, lines named at their ends, PNG and SVG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import RESULTS
from benchmarks.cells import Result
from benchmarks.registry import BENCHMARKS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's palette without its yellow, which is too light for a line on white."""
STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "effclip",  # equal results give equal files
    "svg.fonttype": "none",
}
DPI = 200


def render(maker: Any, result: Result) -> dict[str, Any]:
    """``maker.render(result)`` in this style."""
    with matplotlib.rc_context(STYLE):
        return maker.render(result)


def save(figures: Mapping[str, Figure], folder: Path = RESULTS) -> list[Path]:
    """Write each figure as a PNG of 200 dpi and as an SVG; returns the paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            paths += [folder / f"{name}.png", folder / f"{name}.svg"]
            figure.savefig(paths[-2], dpi=DPI, metadata={"Software": None})
            figure.savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


def legend_entries(figure: Figure) -> dict[str, Artist]:
    """One legend for all panels: what is drawn in any of them, by its label, in the order of the panels."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return entries


def name_lines(axes: Axes, room: float = 0.4) -> None:
    """Write each labelled line's name beside its last point, in its colour; to be called when all lines are drawn.

    Names that would meet are moved up. room: how far the x axis goes on for them, as a share of its length.
    """
    lines = [line for line in axes.lines if not line.get_label().startswith("_") and len(line.get_xdata())]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ticks = [tick for tick in axes.get_xticks() if min(left, right) <= tick <= max(left, right)]
    axes.set_xlim(left, right + room * (right - left))
    axes.set_xticks(ticks)
    height = 13 * (high - low) / axes.get_window_extent().height  # of a name, in units of the axis
    free = -float("inf")
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        free = max(line.get_ydata()[-1], free)
        style = {"color": line.get_color(), "fontsize": 8, "va": "center", "annotation_clip": False}
        axes.annotate(line.get_label(), (line.get_xdata()[-1], free), (7, 0), textcoords="offset points", **style)
        free += height


def main(arguments: Sequence[str] = ()) -> int:
    """Draw every picture again from the stored results."""
    argparse.ArgumentParser(prog="python -m benchmarks figures", description=main.__doc__).parse_args(arguments)
    for entry in BENCHMARKS:
        for result in entry.files(RESULTS):
            for path in save(render(entry.load(), json.loads(result.read_text()))["figures"]):
                print(path.relative_to(RESULTS.parent.parent))
    return 0

"""WAVECLIP's Figure 1: accuracy against multiply-adds, the embedded curve beside the paper's points.

Shapes: M images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cells import Comparison, Result, table
from benchmarks.embedded import models
from benchmarks.printed import paper_numbers
from benchmarks.training import shapes as trained
from benchmarks.waveclip import answers, shapes
from benchmarks.waveclip.costs import expected
from benchmarks.waveclip.exits import curve_by_share
from benchmarks.waveclip.observed import costs, observed, sweep_conditions
from benchmarks.waveclip.sweep import examples, margins, sweep

FLOOR = 61
"""The lowest accuracy of the right panel; points below it are named at its edge."""


def run(smoke: bool = False) -> dict[str, Any]:
    """The margin gate's curve over all thresholds on ``test``, the teacher's point, and the paper's points.

    The report page's slider reads ``sweep``, ``margins`` and ``examples``.  smoke: the first 500 images.
    """
    run_conditions = sweep_conditions()
    test = observed("test", smoke)
    teacher, student = models()
    dense, exits = costs(teacher, student)
    shares, accuracy = curve_by_share(test.margin[0], test.coarse, test.fine)
    printed = paper_numbers("waveclip")
    return {
        "name": "waveclip-fig1",
        "conditions": run_conditions,
        "pictures": len(test.teacher),
        "teacher": {"gmacs": dense.macs.gmacs, "accuracy": test.teacher.double().mean().item()},
        "half": half_resolution(),
        "frontier": [
            {"refined": share, "gmacs": expected(exits, [1 - share, share]).macs.gmacs, "accuracy": correct}
            for share, correct in zip(shares, accuracy, strict=True)
        ],
        "paper": [
            {key: row[key] for key in ("method", "gflops", "accuracy", "refined") if key in row}
            for row in printed["table2"] + printed["prose"]
        ],
        "sweep": sweep(test, exits),
        "margins": margins(test),
        "examples": examples(teacher, student),
    }


def half_resolution() -> dict[str, float] | None:
    """The half-resolution CLIP of seed 0 from its stored answers: what fewer pixels do without a WaveCLIP; or None."""
    file = trained.file("shapes-half-0")
    if not file.is_file():
        return None
    right = answers.read(file)["test"].last
    return {"gmacs": shapes.costs()["half"].macs.gmacs, "accuracy": float(right.mean())}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    points, dense = result["frontier"], result["teacher"]
    rows = [
        [
            f"{100 * point['refined']:.0f} %",
            f"{point['gmacs']:.4f}",
            f"{100 * point['accuracy']:.1f}",
            f"{100 * point['gmacs'] / dense['gmacs']:.0f} %",
        ]
        for point in points[:: max(1, len(points) // 10)]
    ]
    curve = table(["refined", "GMACs", "accuracy", "of the teacher's GMACs"], rows, left=())
    note = (
        f"Embedded scale: the margin gate swept over all thresholds on {result['pictures']:,} test pictures of the "
        f"scenes of shape, one training seed; the dense teacher has {100 * dense['accuracy']:.1f} at "
        f"{dense['gmacs']:.4f} GMACs. Paper scale: the printed points, whose GFLOPs mix two accounts (see Table 2). "
        "The two panels share no axis."
    )
    return {"md": f"{curve}\n\n{note}\n", "figures": {"waveclip-fig1": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    ours, printed = figure.subplots(1, 2)
    points, dense = result["frontier"], result["teacher"]
    ours.plot(
        [point["gmacs"] for point in points],
        [100 * point["accuracy"] for point in points],
        label="WaveCLIP, margin gate",
    )
    ours.plot(dense["gmacs"], 100 * dense["accuracy"], "k*", markersize=11, label="dense teacher")
    if half := result.get("half"):
        ours.plot(half["gmacs"], 100 * half["accuracy"], "ks", markersize=6, label="half-resolution CLIP")
    ours.set(title="scenes of shape, measured, one seed", xlabel="GMACs a picture", ylabel="top-1, %")
    ours.legend()
    for wave, style, label in ((True, "o-", "WAVECLIP"), (False, "ks", "others")):
        rows = sorted(
            (row for row in result["paper"] if row["method"].startswith("WAVECLIP") is wave),
            key=lambda row: row["gflops"],
        )
        xs, ys = [row["gflops"] for row in rows], [row["accuracy"] for row in rows]
        printed.plot(xs, ys, style if wave else "ks", label=label, markersize=5)
    for row in result["paper"]:
        name, right = row["method"].split(" (")[0], row["gflops"] > 12
        place = {"xytext": (-6 if right else 6, -9 if right else 4), "textcoords": "offset points", "fontsize": 7}
        if row["accuracy"] < FLOOR:
            below = f"{name}: {row['accuracy']} at {row['gflops']}, below"
            printed.annotate(below, (1.2, FLOOR + 0.2), **place)
        elif not name.startswith("WAVECLIP"):
            point = (row["gflops"], row["accuracy"])
            printed.annotate(name, point, ha="right" if right else "left", **place)
    printed.set(xlim=(1, 18.5), ylim=(FLOOR, 67))
    printed.set(title="ImageNet-1k, as the paper prints it", xlabel="GFLOPs as printed", ylabel="top-1, %")
    printed.legend(loc="lower right")
    return figure


def compare(result: Result) -> Iterator[Comparison]:
    """The distance of each printed operating point from its teacher, and ours at the nearest share."""
    dense = next(row["accuracy"] for row in result["paper"] if row["method"] == "CLIP ViT-B/16")
    for row in result["paper"]:
        if row.get("refined") is not None:
            nearest = min(result["frontier"], key=lambda point: abs(point["refined"] - row["refined"]))
            ours = 100 * (nearest["accuracy"] - result["teacher"]["accuracy"])
            yield Comparison(f"{row['method']} against its teacher", row["accuracy"] - dense, ours, "points", False)

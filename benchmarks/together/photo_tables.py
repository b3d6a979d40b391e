"""Table and picture of a benchmark on pictures of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cells import table
from benchmarks.together import reference_ladder
from benchmarks.together.frontier import PICTURES
from benchmarks.together.frontier_tables import rows_table, verdicts
from benchmarks.waveclip.controls import CASCADE, HALF, HEADLINE_SEEDS, WAVE, draw_curve, headline, savings_table
from benchmarks.waveclip.table2_embedded import COLUMNS, row_cells


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}; a part that a result lacks was not run."""
    blocks = [text for part, write in PARTS.items() if part in result for text in write(result)]
    figures = {result["name"]: _draw(result)} if "curves" in result else {}
    return {"md": "\n\n".join([*blocks, _note(result)]) + "\n", "figures": figures}


def _accuracies(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    return [table([result["conditions"]["data"], *COLUMNS], [row_cells(row, rows[0]["gmacs"]) for row in rows])]


def _goals(result: dict[str, Any]) -> list[str]:
    """The goals of the two models, and whether the lower ends of the intervals reach them."""
    (passed, near), rows = result["goals"], {row["method"]: row for row in result["rows"]}
    full = rows["WaveCLIP full"]["against_teacher"][1]
    outcome = {True: "reached", False: "NOT reached"}
    return [
        f"The CLIP above {100 * passed:.0f} %: {outcome[rows['teacher (dense)']['interval'][0] >= passed]}. WaveCLIP's "
        f"full level within {100 * near:.0f} points of it: {outcome[full >= -near]}. Both by the lower end of the "
        "interval."
    ]


def _savings(result: dict[str, Any]) -> list[str]:
    lines = result["savings"]
    return [headline(lines, result["conditions"]["seeds"], f"SEEDS={HEADLINE_SEEDS}"), savings_table(lines)]


def _ladder(result: dict[str, Any]) -> list[str]:
    head = ["reference ladder, on val", "accuracy [95 %]"]
    rows = [[row["row"], reference_ladder.cell(row)] for row in result["ladder"]]
    return [table(head, rows)]


def _whose(reducers: Sequence[Mapping[str, Any]]) -> str:
    """Of which trainings the rows of reducers are; the first is the dense teacher's."""
    seeds = reducers[0]["seeds"]
    return "seed 0" if seeds == 1 else f"{seeds} seeds"


def _reducers(result: dict[str, Any]) -> list[str]:
    rows = result["reducers"]
    said = (
        f"Token reducers, {_whose(rows)}, on {PICTURES['test']:,} of the test pictures at most, with settings chosen "
        f"on {PICTURES['val']:,} of val at most."
    )
    if HALF not in {row["method"] for row in rows}:
        said += " This run has no control among the rivals: the half-resolution CLIP and the cascade stand above."
    return [f"{said}\n\n{rows_table(rows, rows[0])}", *verdicts(rows)]


def _trainings(result: dict[str, Any]) -> list[str]:
    rows = [
        [run["name"], f"{run['steps']:,}", f"{run['minutes']:.0f}", f"`{run['command']}`"] for run in result["runs"]
    ]
    return [table(["run", "steps", "minutes", "command"], rows, left=(0, 3))]


PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "rows": _accuracies,
    "goals": _goals,
    "savings": _savings,
    "ladder": _ladder,
    "reducers": _reducers,
    "runs": _trainings,
}
"""What is written of each part of a result, in this order."""


def _note(result: dict[str, Any]) -> str:
    run = result["conditions"]
    val, test = (result["levels"][split]["teacher"]["pictures"] for split in ("val", "test"))
    seeds = "One training seed" if run["seeds"] == 1 else f"{run['seeds']} training seeds"
    sentences = [
        f"Zero-shot among {len(run['classes'])} names by “{run['template']}”, on {test:,} test pictures; "
        f"thresholds chosen on {val:,} pictures held out of train.",
        "GMACs count attention on both sides, the image tower's alone.",
        f"{seeds}.",
    ]
    if "intervals" in run:
        sentences.append(f"Pictures of {run['image_size']} px.")
        sentences.append(f"Intervals: {run['intervals']}; one seed leaves the spread between trainings out.")
        sentences.append(
            "The teacher trained on has the student's steps, labels and rate; the half-resolution CLIP the steps of "
            "teacher and student together; the cascade asks the half-resolution CLIP first, then the teacher trained "
            "on, and shares nothing."
        )
    if "test_reads" in run:
        sentences.append(f"Reads of test by the most often read of these models: {run['test_reads']}.")
    sentences.append(f"{run['dtype']} on {run['device']}, {run['threads']} threads, torch {run['torch']}.")
    return " ".join(sentences)


def _draw(result: dict[str, Any]) -> Figure:
    """Accuracy against multiply-adds: early exit as lines, single models as points with their intervals."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    colours = {WAVE: "#0072b2", CASCADE: "#d55e00"}  # told apart by the colour-blind
    for name, curve in result["curves"].items():
        draw_curve(axes, curve, name, scale=1000, color=colours[name])
    for row in result["rows"]:
        if row["refined"] is None:
            (x,), (y, low, high) = _millions([row["gmacs"]]), _percent([row["accuracy"], *row["interval"]])
            axes.vlines(x, low, high, color="black")
            axes.plot(x, y, "o", color="black", markersize=4)
            beside = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 8, "zorder": 3}  # over the lines
            axes.annotate(row["method"], (x, y), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3}, **beside)
    reducers = [row for row in result["reducers"] if " + " in row["method"] and not row["composed"]]
    xs, ys = _millions([row["gmacs"] for row in reducers]), _percent([row["accuracy"] for row in reducers])
    axes.plot(xs, ys, "x", color="#009e73", markersize=5, label="teacher with a token reducer, seed 0")
    axes.set(xlabel="million multiply-adds a picture", ylabel="top-1 on test, %", title=result["conditions"]["data"])
    axes.margins(x=0.12, y=0.1)
    axes.legend(fontsize=8)
    return figure


def _millions(gmacs: Sequence[float]) -> list[float]:
    return [1000 * value for value in gmacs]


def _percent(fractions: Sequence[float]) -> list[float]:
    return [100 * value for value in fractions]

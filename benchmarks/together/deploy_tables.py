"""The tables of ``deploy_costs`` as Markdown: speed and accuracy, needs, and whether the goals are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.cells import accuracy, points, table
from benchmarks.statistics import median_interval
from benchmarks.together.deploy_costs import BATCHES, DENSE, WAVE
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8


class Goal(NamedTuple):
    """So many times the speed of a dense CLIP, at most so much below its accuracy.

    against, ratios: where a row has its difference of accuracy from that CLIP, and its speeds over it.
    """

    times: float
    within: float
    dense: str
    against: str
    ratios: str


GOALS = Goal(5, 0.01, REFERENCE, "against", "ratios"), Goal(1.5, 0.005, REFERENCE_INT8, "against_int8", "ratios_int8")
GOAL_BATCHES = ("1", "8")


def parts(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown: speed and accuracy, then needs, of each case; and what was not measured."""
    texts = []
    for name, found in result["tables"].items():
        tested = bool(found["pictures"])
        head = ["engine", "model", *(["accuracy [95 %]", "against dense fp32", "refined"] if tested else [])]
        head += [f"images/s, batch {batch}" for batch in BATCHES]
        lines = [
            [
                row["engine"],
                f"{row['side']} {row['point']}".strip(),
                *(_accuracy_cells(row) if tested else []),
                *(_speed_cell(row["speed"][str(batch)]) for batch in BATCHES),
            ]
            for row in found["rows"]
        ]
        about = (
            f"Data: {name}, {found['pictures']['test']:,} pictures of test."
            if tested
            else ("Random weights of ViT-B/16's size: costs alone.")
        )
        texts += [
            f"{about} Brackets behind images/s: × dense PyTorch fp32, and × dense ONNX Runtime int8, medians of "
            f"{found['rounds']} rounds in which all rows take turns, on {found['timed']} pictures drawn at random. "
            "Every engine runs in a process of its own and sleeps between its turns.",
            table(head, lines, left=(0, 1)),
            _needs(found["needs"]),
        ]
        texts += _not_measured(found["missing"])
        texts += goals(found["rows"]) if tested else []
    return texts + _not_measured(result["missing"])


def _not_measured(missing: Mapping[str, str]) -> list[str]:
    """What is missing, each with how to get it or how it failed."""
    ways = "; ".join(f"{name} ({way})" for name, way in missing.items())
    return [f"Not measured: {ways}."] if ways else []


def _accuracy_cells(row: dict[str, Any]) -> list[str]:
    refined = "–" if row["side"] == DENSE else f"{100 * row['refined']:.1f} %"
    return [accuracy(row["accuracy"], row["interval"]), points(row["against"]), refined]


def _speed_cell(speed: dict[str, Any]) -> str:
    ratios = ", ".join(f"×{median(speed[name]):.2f}" for name in ("ratios", "ratios_int8"))
    return f"{speed['images_per_second']:.1f} ({ratios})"


def _needs(needs: Sequence[dict[str, Any]]) -> str:
    """Size, start-up and memory of every engine, either model in one line."""
    cells: dict[str, list[str]] = {}
    for need in needs:
        first = need["first"] or {}
        cells.setdefault(need["engine"], []).extend(
            [
                f"{need['bytes'] / 1e6:.3g}",
                f"{first['seconds']:.2f}" if first else "–",
                f"{first['peak_bytes'] / 1e6:.0f}" if first else "–",
            ]
        )
    head = [f"{side}: {what}" for side in (DENSE, WAVE) for what in ("MB", "s to 32 answers", "peak MB")]
    rows = [[name, *values] for name, values in cells.items()]
    return table(["engine", *head], rows) + (
        "\n\nMB: weights of the image tower. Seconds run from the start of a process to its answers for 32 pictures by "
        "all levels; peak MB is that process's largest resident size."
    )


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each goal and batch: whether a WaveCLIP reaches it, which one, and its numbers."""
    waves = [row for row in rows if row["side"] == WAVE]
    lines = [_goal(goal, batch, waves) for goal in GOALS for batch in GOAL_BATCHES]
    return ["Goals, each by the lower ends of the intervals of speed and accuracy:\n\n" + "\n".join(lines)]


def _goal(goal: Goal, batch: str, waves: Sequence[dict[str, Any]]) -> str:
    """The fastest of the rows that are near enough in accuracy; where none is, the most accurate row."""
    near = [row for row in waves if row[goal.against][1] >= -goal.within]
    if near:
        best = max(near, key=lambda row: _times(row, batch, goal)[1])
        which = f"the fastest of {len(near)} near enough"
    else:
        best = max(waves, key=lambda row: row[goal.against][1])
        which = f"the most accurate of {len(waves)}; none is near enough"
    middle, low, high = _times(best, batch, goal)
    outcome = "reached" if near and low >= goal.times else "NOT reached"
    return (
        f"- batch {batch}, {goal.times:g} × dense {goal.dense} within {100 * goal.within:g} point: {outcome}. "
        f"×{middle:.2f} [{low:.2f}, {high:.2f}] at {points(best[goal.against])} points by WaveCLIP {best['point']}, "
        f"{best['engine']} ({which})."
    )


def _times(row: dict[str, Any], batch: str, goal: Goal) -> tuple[float, float, float]:
    """The median of a row's speeds over the goal's dense CLIP, with its interval."""
    values = row["speed"][batch][goal.ratios]
    return (median(values), *median_interval(values))

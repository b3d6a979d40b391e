"""The tables of ``deploy_costs`` as Markdown: speed and accuracy, needs, and whether the goals are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks import read_log
from benchmarks.cells import accuracy, points, table
from benchmarks.statistics import median_interval
from benchmarks.together.deploy_cases import BATCHES, CASCADE, DENSE, FIRST, SHAPES, WAVE
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8
from benchmarks.together.embedded_reference import sentence


class Goal(NamedTuple):
    """So many times the speed of a dense CLIP, at most so much below its accuracy.

    against, ratios: where a row has its difference of accuracy from that CLIP, and its speeds over it.
    """

    times: float
    within: float
    dense: str
    against: str
    ratios: str

    def __str__(self) -> str:
        return f"{self.times:g} × dense {self.dense} within {100 * self.within:g} point"


GOALS = Goal(5, 0.01, REFERENCE, "against", "ratios"), Goal(1.5, 0.005, REFERENCE_INT8, "against_int8", "ratios_int8")
GOAL_BATCHES = ("1", "8")


def parts(result: dict[str, Any], run: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown: speed and accuracy, then needs, of each case; and what was not measured.

    run: the conditions of a table that has none of its own.
    """
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
            "Every engine runs in a process of its own and sleeps between its turns. "
            + _machine(found.get("conditions", run))
            + _answered(found)
            + _grouped(found.get("groups", ()))
            + read_log.remark(found.get("answered") or found.get("conditions", run)),
            *_training(found.get("steps", {})),
            table(head, lines, left=(0, 1)),
            _needs(found["needs"]),
        ]
        texts += _not_measured(found["missing"])
        texts += goals(found["rows"]) if tested else []
    texts += [sentence()] if SHAPES in result["tables"] else []
    return texts + _not_measured(result["missing"])


def _answered(found: Mapping[str, Any]) -> str:
    """When the accuracies were measured, where the times are of a later run."""
    if "answered" not in found:
        return ""
    answered, timed = (found[name]["date"][:16].replace("T", " ") for name in ("answered", "conditions"))
    return f" The times were measured at {timed}, all else before, at {answered}."


def _machine(run: Mapping[str, Any]) -> str:
    return f"{run['device']}, {run['threads']} threads, torch {run['torch']}."


def _grouped(groups: Sequence[Sequence[str]]) -> str:
    """Which engines took turns with each other, where not all of them did."""
    if len(groups) < 2:
        return ""
    return (
        f" The engines take turns in {len(groups)} groups, because memory does not hold all of them at once. Both "
        "dense references run in every group, which is compared with them; their images/s are those of the first."
    )


def _training(steps: Mapping[str, int]) -> list[str]:
    """How long every model was trained, where that is known."""
    if not steps.keys() >= {DENSE, WAVE}:
        return []
    dense, wave, first = steps[DENSE], steps[WAVE], steps.get(FIRST)
    text = f"Training steps: dense {dense:,}; WaveCLIP {wave:,} after those of dense, its teacher: {dense + wave:,}."
    if first:
        text += (
            f" The cascade's first model has {first:,} at half the resolution, its second is dense: {dense + first:,}."
        )
    return [text]


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
    """Size, start-up and memory of every engine, all models in one line."""
    sides = dict.fromkeys(need["model"] for need in needs)
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
    head = [f"{side}: {what}" for side in sides for what in ("MB", "s to 32 answers", "peak MB")]
    rows = [[name, *values] for name, values in cells.items()]
    return table(["engine", *head], rows) + (
        "\n\nMB: weights of the image tower. Seconds run from the start of a process to its answers for 32 pictures by "
        "all levels; peak MB is that process's largest resident size."
    )


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each goal and batch: whether a WaveCLIP reaches it, which one, and its numbers.

    A line for each goal says the same of the cascade, its control.
    """
    waves, cascades = ([row for row in rows if row["side"] == side] for side in (WAVE, CASCADE))
    lines = [f"- batch {batch}, {goal}: {_outcome(goal, batch, waves)}" for goal in GOALS for batch in GOAL_BATCHES]
    for goal in GOALS if cascades else ():
        outcomes = [f"Batch {batch}: {_outcome(goal, batch, cascades)}" for batch in GOAL_BATCHES]
        lines.append(f"- its control, the {CASCADE}, {goal}. {' '.join(outcomes)}")
    return ["Goals, each by the lower ends of the intervals of speed and accuracy:\n\n" + "\n".join(lines)]


def _outcome(goal: Goal, batch: str, rows: Sequence[dict[str, Any]]) -> str:
    """What the fastest of the rows that are near enough in accuracy reaches; where none is, the most accurate row."""
    near = [row for row in rows if row[goal.against][1] >= -goal.within]
    if near:
        best = max(near, key=lambda row: _times(row, batch, goal)[1])
        which = f"the fastest of {len(near)} near enough"
    else:
        best = max(rows, key=lambda row: row[goal.against][1])
        which = f"the most accurate of {len(rows)}; none is near enough"
    middle, low, high = _times(best, batch, goal)
    outcome = "reached" if near and low >= goal.times else "NOT reached"
    return (
        f"{outcome}. ×{middle:.2f} [{low:.2f}, {high:.2f}] at {points(best[goal.against])} points by {best['side']} "
        f"{best['point']}, {best['engine']} ({which})."
    )


def _times(row: dict[str, Any], batch: str, goal: Goal) -> tuple[float, float, float]:
    """The median of a row's speeds over the goal's dense CLIP, with its interval."""
    values = row["speed"][batch][goal.ratios]
    return (median(values), *median_interval(values))

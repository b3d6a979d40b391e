"""Patch Ranking's Figure 1 at embedded scale: accuracy against multiply-adds at keep 100 to 50 %, tuned and not.

Collected from the finished runs (``benchmarks.patchrank_runs``).
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.patchrank_runs import KINDS, results
from benchmarks.patchrank_tables import COMMAND, DENSE, OURS, ROWS, Known, Source, attended, percent, pruned, tuned
from benchmarks.patchrank_tasks import KEEP, KEEPS, STYLES, TASKS, Task
from common.conditions import conditions

RATES = (1.0, *KEEPS)


def curves() -> dict[str, dict[float, Source]]:
    """Each curve's results by keep rate. Prompts tuned at keep .6 serve all rates below 1."""
    untuned = {"class attention": attended, OURS: pruned}
    return {
        **{name: {1.0: ROWS[DENSE], **{keep: of(keep) for keep in KEEPS}} for name, of in untuned.items()},
        **{
            f"{OURS} + {short} prompts": {1.0: tuned(kind, 1.0), **{keep: tuned(kind, KEEP, keep) for keep in KEEPS}}
            for kind, short in KINDS.items()
        },
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """What the finished runs found. smoke: the same."""
    known, stated = results(), conditions("embedded", chosen_on="nothing is chosen: a sweep")
    rows = [
        {"curve": name, "task": task.name, "points": points}
        for task in TASKS
        for name, sources in curves().items()
        if (points := _points(known, task, sources))
    ]
    return {"name": "patchrank-fig1", "conditions": stated, "rows": rows}


def _points(known: Known, task: Task, sources: dict[float, Source]) -> list[dict[str, Any]]:
    """A curve's points that were run: keep rate, GMACs, accuracies by seed."""
    found = {keep: source.of(known, task) for keep, source in sources.items()}
    return [
        {"keep": keep, "gmacs": entries[0]["gmacs"], "accuracy": [entry["accuracy"] for entry in entries]}
        for keep, entries in found.items()
        if entries
    ]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    lines = [f"| task | method | {' | '.join(f'{keep:.0%}' for keep in RATES)} |", f"|---|---|{'---:|' * len(RATES)}"]
    for row in result["rows"]:
        by = {point["keep"]: percent(point["accuracy"]) for point in row["points"]}
        lines.append(f"| {row['task']} | {row['curve']} | {' | '.join(by.get(keep, 'not run') for keep in RATES)} |")
    if not result["rows"]:
        lines = [f"Not run: `{COMMAND}`."]
    seeds = max((len(point["accuracy"]) for row in result["rows"] for point in row["points"]), default=0)
    note = (
        f"Embedded scale: top-1 on test in %, mean ± standard deviation over up to {seeds} training seeds, by the "
        "share of patch tokens kept from block 1 on. Prompts are tuned with 16 shots, the same steps each: without "
        f"pruning for 100 %, at keep {KEEP} for all other rates. T: text prompts; V+T: visual prompts mapped from "
        "text prompts. "
        "The paper draws its curves for Caltech101 and prints no numbers."
    )
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {"patchrank-fig1": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"])) or [task.name for task in STYLES]
    figure = Figure(figsize=(3.4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in result["rows"] if row["task"] == task):
            points = sorted(row["points"], key=lambda point: point["gmacs"])
            means = [100 * fmean(point["accuracy"]) for point in points]
            axes.plot([point["gmacs"] for point in points], means, "o-", markersize=4, label=row["curve"])
        axes.set(title=task, xlabel="GMACs a picture", ylabel="top-1, %")
    if result["rows"]:
        axes.legend(fontsize=7)
    return figure

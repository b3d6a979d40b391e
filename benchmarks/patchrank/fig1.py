"""Patch Ranking's Figure 1 at embedded scale: accuracy against multiply-adds at keep 100 to 50 %, tuned and not.

Collected from the finished runs (``benchmarks.patchrank.runs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cells import Result, missing_runs, percent, saved
from benchmarks.patchrank.rows import COMMAND, DENSE, OURS, ROWS, Known, Source, attended, planned, pruned, tuned
from benchmarks.patchrank.runs import KINDS, results
from benchmarks.patchrank.tasks import KEEP, KEEPS, STYLES, TASKS, Task
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
    dense = {task: ROWS[DENSE].of(known, task)[0]["gmacs"] for task in TASKS if ROWS[DENSE].of(known, task)}
    rows = [
        {"curve": name, "task": task.name, "dense": dense[task], "points": points}
        for task in dense  # evaluated before anything is trained
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
    rows = [
        (row["task"], row["curve"], *_cells(row, lambda point: percent(point["accuracy"]))) for row in result["rows"]
    ]
    parts = [_table(("task", "method"), rows), _table(("GMACs, saved", "method"), _costs(result["rows"]))]
    if not result["rows"]:
        parts = [f"Not run: `{COMMAND}`."]
    seeds = max((len(point["accuracy"]) for row in result["rows"] for point in row["points"]), default=0)
    note = (
        f"Embedded scale: top-1 on test in %, mean ± standard deviation over up to {seeds} training seeds, by the "
        "share of patch tokens kept from block 1 on. Prompts are tuned with 16 shots, the same steps each: without "
        f"pruning for 100 %, at keep {KEEP} for all other rates. T: text prompts; V+T: visual prompts mapped from "
        "text prompts. GMACs are the image tower's, saved is against all its tokens without prompts. "
        "The paper draws its curves for Caltech101 and prints no numbers."
    )
    return {"md": "\n\n".join([*parts, note]) + "\n", "figures": {"patchrank-fig1": _draw(result)}}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [*head, *(f"{keep:.0%}" for keep in RATES)]
    lines = [cells, ["---", "---", *["---:"] * len(RATES)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, Any], of: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A cell for each keep rate."""
    by = {point["keep"]: of(point) for point in row["points"]}
    return [by.get(keep, "not run") for keep in RATES]


def _costs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What each method costs, tasks whose towers cost the same in one line."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = _cells(row, lambda point, row=row: f"{point['gmacs']:.4f}, {saved(point['gmacs'], row['dense'])}")
        tasks.setdefault((row["curve"], *cells), []).append(row["task"])
    return [(", ".join(names), *cells) for cells, names in tasks.items()]


def _draw(result: dict[str, Any]) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"])) or [task.name for task in STYLES]
    figure = Figure(figsize=(3.4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in result["rows"] if row["task"] == task):
            points = sorted(row["points"], key=lambda point: point["gmacs"])
            means = [100 * fmean(point["accuracy"]) for point in points]
            axes.plot([point["gmacs"] for point in points], means, "o-", markersize=4, label=row["curve"])
        axes.set(title=task, xlabel="GMACs a picture", ylabel="top-1, %")
        axes.locator_params(axis="x", nbins=4)
    if result["rows"]:
        axes.legend(fontsize=7)
    return figure


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings that were not run, a curve once for every task; at keep 100 % an untuned one is the dense model."""
    seeds = (min((len(p["accuracy"]) for p in row["points"] if p["keep"] < 1), default=0) for row in result["rows"])
    rows = ((row["curve"], made, planned(row["curve"])) for row, made in zip(result["rows"], seeds, strict=True))
    yield from missing_runs(rows, COMMAND)

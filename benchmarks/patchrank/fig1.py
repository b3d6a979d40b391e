"""Patch Ranking's Figure 1 at embedded scale: accuracy against multiply-adds at keep 100 to 50 %, tuned and untuned.

The results of the finished runs (``benchmarks.patchrank.runs``) are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from benchmarks import read_log
from benchmarks.cells import Result, missing_runs, percent, saved, table
from benchmarks.figures import legend_entries
from benchmarks.patchrank.methods import DENSE, OURS, which_attention
from benchmarks.patchrank.rows import ROWS, Known, Source, attended, planned, pruned, tuned
from benchmarks.patchrank.runs import COMMAND, KINDS, results
from benchmarks.patchrank.tasks import KEEP, KEEPS, TASKS, Task
from benchmarks.together.embedded_reference import sentence
from common.conditions import conditions

RATES = (1.0, *KEEPS)


def curves() -> dict[str, dict[float, Source]]:
    """The source of each curve's results, by keep rate. Prompts tuned at keep .6 serve all rates below 1."""
    untuned = {"class attention": attended, OURS: pruned}
    return {
        **{name: {1.0: ROWS[DENSE], **{keep: source(keep) for keep in KEEPS}} for name, source in untuned.items()},
        **{
            f"{OURS} + {short} prompts": {1.0: tuned(kind, 1.0), **{keep: tuned(kind, KEEP, keep) for keep in KEEPS}}
            for kind, short in KINDS.items()
        },
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """The curves from the results of the finished runs. smoke: the same."""
    known, chosen = results(), "nothing is chosen: a sweep"
    reads = {task.name: read_log.reads_of_all(task.logged) for task in TASKS}
    setting = conditions("embedded", chosen_on=chosen, reads_of_test=reads)
    whole = {task: entries[0] for task in TASKS if (entries := ROWS[DENSE].entries_of(task, known))}
    dense, unpruned = ({task: entry[what] for task, entry in whole.items()} for what in ("gmacs", "accuracy"))
    rows = [
        {"curve": name, "task": task.name, "dense": dense[task], "unpruned": unpruned[task], "points": points}
        for task in dense  # evaluated before anything is trained
        for name, sources in curves().items()
        if (points := _points(known, task, sources))
    ]
    return {"name": "patchrank-fig1", "conditions": setting, "rows": rows}


def _points(known: Known, task: Task, sources: dict[float, Source]) -> list[dict[str, Any]]:
    """The points of a curve that were run: keep rate, GMACs, accuracies by seed."""
    return [
        {"keep": keep, "gmacs": entries[0]["gmacs"], "accuracy": [entry["accuracy"] for entry in entries]}
        for keep, source in sources.items()
        if (entries := source.entries_of(task, known))
    ]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows = [
        (row["task"], row["curve"], *_cells(row, lambda point: percent(point["accuracy"]))) for row in result["rows"]
    ]
    rates = [f"{keep:.0%}" for keep in RATES]
    parts = [
        table(["task", "method", *rates], rows, left=(0, 1)),
        table(["GMACs, saved", "method", *rates], _costs(result["rows"]), left=(0, 1)),
    ]
    if not result["rows"]:
        parts = [f"Not run: `{COMMAND}`."]
    seeds = max((len(point["accuracy"]) for row in result["rows"] for point in row["points"]), default=0)
    note = (
        f"Embedded scale: top-1 on test in %, mean ± standard deviation over up to {seeds} training seeds, by the "
        "share of patch tokens kept from block 1 on. Prompts are tuned with 16 shots, the same steps each: without "
        f"pruning for 100 %, at keep {KEEP} for all other rates. T: text prompts; V+T: visual prompts mapped from "
        "text prompts. GMACs are the image tower's, saved is against all its tokens without prompts. "
        f"{which_attention()} The paper draws its curves for Caltech101 and prints no numbers."
        f"{read_log.remark(result['conditions'])}"
    )
    return {"md": "\n\n".join([*parts, sentence(), note]) + "\n", "figures": {"patchrank-fig1": _draw(result)}}


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings that were not run: those of each curve once for every task.

    At keep 100 % an untuned curve has the dense model, which is not trained here.
    """
    rows = []
    for row in result["rows"]:
        seeds = [len(point["accuracy"]) for point in row["points"] if point["keep"] < 1]
        rows.append((row["curve"], min(seeds, default=0), planned(row["curve"])))
    yield from missing_runs(rows, COMMAND)


def _cells(row: Mapping[str, Any], cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """The row's cell for each keep rate. cell: a point's text."""
    cells = {point["keep"]: cell(point) for point in row["points"]}
    return [cells.get(keep, "not run") for keep in RATES]


def _costs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The costs of each method; tasks whose towers cost the same share a line."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = _cells(row, lambda point, row=row: f"{point['gmacs']:.4f}, {saved(point['gmacs'], row['dense'])}")
        tasks.setdefault((row["curve"], *cells), []).append(row["task"])
    return [(", ".join(names), *cells) for cells, names in tasks.items()]


def _draw(result: dict[str, Any]) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"])) or [task.name for task in TASKS[:1]]
    curves = list(dict.fromkeys(row["curve"] for row in result["rows"]))
    figure = Figure(figsize=(3.4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in result["rows"] if row["task"] == task):
            points = sorted(row["points"], key=lambda point: point["gmacs"])
            means = [100 * fmean(point["accuracy"]) for point in points]
            xs, spread = [point["gmacs"] for point in points], [100 * _spread(point["accuracy"]) for point in points]
            # A curve has one look in all panels, and lines that coincide keep their own marks.
            number = curves.index(row["curve"])
            style = {"color": f"C{number}", "marker": "osD^v"[number], "markersize": 4, "capsize": 2}
            axes.errorbar(xs, means, spread, label=row["curve"], **style)
        top1 = next(100 * row["unpruned"] for row in result["rows"] if row["task"] == task) if result["rows"] else None
        if top1 is not None:
            axes.axhline(top1, color="0.5", linewidth=1, linestyle=":", label="unpruned, untuned")
        axes.set(title=task, xlabel="GMACs a picture", ylabel="top-1, %")
        axes.locator_params(axis="x", nbins=4)
    if result["rows"]:
        entries = legend_entries(figure)
        columns = min(len(entries), 2 * len(tasks))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
    return figure


def _spread(accuracies: Sequence[float]) -> float:
    """The standard deviation over training seeds; 0 for one."""
    return stdev(accuracies) if len(accuracies) > 1 else 0.0

"""Patch Ranking's tables: methods x tasks at one keep rate with costs, their differences, and what the oracle reaches.

All of it comes from the finished runs (``benchmarks.patchrank.runs``); ``benchmarks.patchrank.costs`` measures times.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import read_log
from benchmarks.cells import Comparison, Result, mean, missing_runs, percent, points, saved, table
from benchmarks.figures import COLOURS, legend_entries
from benchmarks.patchrank import comparisons
from benchmarks.patchrank.methods import DENSE, remark, titled, which_attention
from benchmarks.patchrank.rows import ROWS, Known, correct, name_of_tuned, planned, tuned
from benchmarks.patchrank.runs import COMMAND, KINDS, results
from benchmarks.patchrank.tasks import KEEP, PRUNE_LAYER, SHAPES, TASKS, Task
from benchmarks.printed import paper_numbers
from benchmarks.statistics import difference, mean_over_sets
from benchmarks.together.embedded_reference import sentence
from common.conditions import conditions
from common.reducer_registry import REVISION

OUR_BEST = name_of_tuned("coupled", KEEP)


def run(smoke: bool = False) -> dict[str, Any]:
    """The tables from the finished runs. smoke: the same."""
    known = results()
    setting = conditions(
        "embedded",
        dtype="float32",
        keep=KEEP,
        prune_layer=PRUNE_LAYER,
        chosen_on="val",
        reported_on="test",
        intervals="95 %, resampling pictures and training seeds",
        test_reads={task.name: read_log.reads_of_all(task.logged) for task in TASKS},
    )
    made = {name: run["conditions"] for name, run in known.items()}
    setting["reducers"] = min(
        (run.get("reducers", 1) for name, run in made.items() if name.endswith("-baselines")), default=REVISION
    )
    setting["runs"] = {
        what: sorted({run[what] or "32-true" for run in made.values() if what in run})
        for what in ("device", "torch", "precision")
    }
    return {
        "name": "patchrank-table1",
        "conditions": setting,
        "rows": [_row(known, name) for name in ROWS],
        "rivals": comparisons.rivals(known),
        "learned": comparisons.learned(known),
        "oracle": comparisons.oracle(known),
        "headline": headline(known),
    }


def _row(known: Known, name: str) -> dict[str, Any]:
    """A row's accuracies by seed and its GMACs, each by task."""
    by_task = {task.name: entries for task in TASKS if (entries := ROWS[name].entries_of(task, known))}
    return {
        "row": name,
        "accuracy": {task: [entry["accuracy"] for entry in entries] for task, entries in by_task.items()},
        "pictures": {task: entries[0]["pictures"] for task, entries in by_task.items()},
        "gmacs": {task: fmean(entry["gmacs"] for entry in entries) for task, entries in by_task.items()},
    }


def headline(known: Known) -> dict[str, Any] | None:
    """The accuracy that pruning costs after tuning, by task and averaged: tuned and pruned less tuned and unpruned.

    The unpruned model has the better of the two kinds of prompts, by val. None: no task was run.
    """
    lost, by_task, chosen = [], {}, {}
    for task in TASKS:
        val = {kind: _val_accuracy(known, task, kind) for kind in KINDS}
        if None in val.values():
            continue
        kind = max(val, key=val.get)
        sources = tuned("coupled", KEEP), tuned(kind, 1.0)
        by_seed = [dict(zip(row.seeds_of(task, known), row.entries_of(task, known), strict=True)) for row in sources]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        if not seeds:
            continue
        sides = [correct([entries[seed] for seed in seeds]).float() for entries in by_seed]
        chosen[task.name] = name_of_tuned(kind, 1.0)
        by_task[task.name] = difference(*sides, paired_seeds=True).ends
        lost.append(np.asarray(sides[0] - sides[1]))
    if not lost:
        return None
    over_tasks = mean_over_sets(lost)
    return {"unpruned": chosen, "tasks": by_task, "all": over_tasks.ends, "seeds": over_tasks.seeds}


def _val_accuracy(known: Known, task: Task, kind: str) -> float | None:
    """Mean accuracy on val of one kind of prompts, tuned without pruning; None: not run."""
    names = tuned(kind, 1.0).files(task)
    return mean([known[name]["val"]["1.0"]["accuracy"] for name in names if name in known])


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    names = [task.name for task in TASKS]
    costs = [f"{what}, {name}" for what in ("GMACs", "saved") for name in names]
    head = ["method", *names, *costs, "paper, mean of 8 sets"]
    dense = next(row for row in result["rows"] if row["row"] == DENSE)
    parts = [
        table(head, [_cells(row, dense) for row in result["rows"]]),
        _headline(result["headline"]),
        comparisons.rivals_table(result["rivals"]),
        comparisons.learned_table(result["learned"]),
        comparisons.oracle_table(result["oracle"]),
        _paper_table(),
        sentence(),
        _reading(result),
    ]
    return {"md": "\n\n".join(parts) + "\n", "figures": {"patchrank-table1": _draw(result)}}


def compare(result: Result) -> Iterator[Comparison]:
    """The paper's means over data sets, and its loss of accuracy after tuning."""
    ours = {row["row"]: row["accuracy"] for row in result["rows"]}
    printed = paper_numbers("patchrank")
    for row in printed["table1"]:
        tasks = ours.get(row["row"], {})
        reached = 100 * fmean(map(fmean, tasks.values())) if tasks else None
        what = f"{row['method']} at one keep rate, mean over data sets"
        yield Comparison(what, fmean(row["accuracy"]), reached, "%", False)
    loss = result["headline"] and -100 * result["headline"]["all"][0]
    yield Comparison("lost by dropping 40 % of the patches, after tuning", printed["loss"], loss, "points", False)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings that were not run; a row has as many seeds as its task with the fewest."""
    rows = (
        (row["row"], min(map(len, row["accuracy"].values()), default=0), planned(row["row"])) for row in result["rows"]
    )
    yield from missing_runs(rows, COMMAND)


def _cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    names = [task.name for task in TASKS]
    cells = [_accuracy(row, name) for name in names]
    costs = [f"{row['gmacs'][name]:.4f}" if name in row["gmacs"] else "not run" for name in names]
    less = [saved(row["gmacs"][name], dense["gmacs"][name]) if name in row["gmacs"] else "not run" for name in names]
    printed = {line["row"]: f"{fmean(line['accuracy']):.1f}" for line in paper_numbers("patchrank")["table1"]}
    return [titled(row["row"]), *cells, *costs, *less, printed.get(row["row"], "–")]


def _accuracy(row: dict[str, Any], task: str) -> str:
    values = row["accuracy"].get(task)
    if values is None:
        return "not run"
    return percent(values) + (" (one seed)" if len(values) == 1 < planned(row["row"]) else "")


def _headline(headline: dict[str, Any] | None) -> str:
    if headline is None:
        return f"Headline: not run (`{COMMAND}`)."
    by_task = ", ".join(f"{name} {points(change)}" for name, change in headline["tasks"].items())
    against = ", ".join(f"{name}: {row}" for name, row in headline["unpruned"].items())
    return (
        f"**Headline**: at keep {KEEP}, {OUR_BEST} against the unpruned model tuned likewise, in points: mean of "
        f"{len(headline['tasks'])} tasks {points(headline['all'])}; {by_task}. The unpruned model has the better kind "
        f"of prompts by val ({against}). {headline['seeds']} training seeds, intervals over seeds and pictures. The "
        f"paper states a loss of {paper_numbers('patchrank')['loss']} points over seven data sets."
    )


def _paper_table() -> str:
    printed = paper_numbers("patchrank")
    rows = [
        [row["method"], *(f"{value:.1f}" for value in (*row["accuracy"], fmean(row["accuracy"])))]
        for row in printed["table1"]
    ]
    note = (
        "The paper's rows are those of its released code's README, since its own tables were not to be had. All stand "
        f"under “Avg. GFLOPs {printed['gflops']}”, which cannot be the pruned image tower: "
        "that is what ViT-B/16 costs with all its tokens (16.87 without attention's products). Keeping 60 % from "
        "block 3 on costs 11.9 (12.3 with them), see `make reproduce-patchrank-costs`. Neither its keep rate, nor its "
        "shots, nor whether its rows are tuned is stated."
    )
    return f"{table(['paper, other data', *printed['sets'], 'mean'], rows)}\n\n{note}"


def _reading(result: dict[str, Any]) -> str:
    setting = result["conditions"]
    seeds = max((len(values) for row in result["rows"] for values in row["accuracy"].values()), default=0)
    shown = {task: count for row in result["rows"] for task, count in row["pictures"].items()}
    pictures = ", ".join(f"{task} {count:,}" for task, count in shown.items()) or "none yet"
    shots = ", ".join(f"{task.name} {task.shots}" for task in TASKS)
    waiting = [task for task in TASKS if any(task.name not in row["accuracy"] for row in result["rows"])]
    needs = ", ".join(f"{task.name} needs {task.variable}" for task in waiting if task.variable)
    not_run = f" Not run yet: `{COMMAND}`{f' ({needs})' if needs else ''}." if waiting else ""
    reads = ", ".join(f"{name} {count}" for name, count in setting["test_reads"].items())
    made = {what: " and ".join(values) for what, values in setting["runs"].items()}
    return (
        f"Embedded scale, keep {setting['keep']}, pruned before block {setting['prune_layer']}: a quarter of the "
        "depth, as block 3 of 12 (a third in Fashion-MNIST's tower of 3 blocks). Top-1 in %, mean ± standard deviation "
        f"over up to {seeds} training seeds (random: draws); test pictures: {pictures}; reads of these pictures so "
        f"far, by whatever models: {reads}. Predictors and the trained rivals learn from pictures ({shots} of "
        "each class) without labels, CrossGET from their classes' prompts too, prompts from 16 shots. DynamicViT and "
        "its control take ten times the steps of the others. GMACs have attention on both sides; A-ViT's are "
        "measured means, and it is run masked. Each task has one CLIP of its own, with which all seeds begin: the "
        "spread between CLIPs is in no interval, and the paper's row of one predictor for all sets has none here. "
        f"{which_attention()} "
        f"Trained in {made['precision'] or 'no run yet'}, evaluated in {setting['dtype']}, on {made['device']}, torch "
        f"{made['torch']}."
        f"{remark(setting)}{not_run}"
    )


def _draw(result: dict[str, Any]) -> Figure:
    """Accuracy against GMACs, one panel a task and one point a row; a line shows the unpruned model's accuracy."""
    tasks = list(dict.fromkeys(task for row in result["rows"] for task in row["accuracy"])) or [SHAPES.name]
    figure = Figure(figsize=(4.2 * len(tasks) + 2.4, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for number, row in enumerate(result["rows"]):
            if task in row["accuracy"]:
                # Every row has its own pair of colour and mark, on all panels the same, hollow where two coincide.
                style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD"[number // len(COLOURS)]}
                top1 = 100 * fmean(row["accuracy"][task])
                axes.plot(
                    row["gmacs"][task], top1, linestyle="none", fillstyle="none", label=titled(row["row"]), **style
                )
                if row["row"] == DENSE:
                    axes.axhline(top1, color="0.7", linewidth=1, zorder=0)
        axes.set(title=f"{task}, keep {KEEP}", xlabel="GMACs a picture", ylabel="top-1, %")
        axes.locator_params(axis="x", nbins=4)
    if entries := legend_entries(figure):
        figure.legend(entries.values(), entries.keys(), loc="outside right center")
    return figure

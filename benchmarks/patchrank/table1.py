"""Patch Ranking's table: methods x tasks at one keep rate, with costs; and the headline, the loss left after tuning.

Accuracies come from the finished runs (``benchmarks.patchrank.runs``); times are measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.cells import Comparison, Result, mean, missing_runs, paired_interval, percent, points, saved, table
from benchmarks.figures import COLOURS
from benchmarks.patchrank.methods import DENSE, OURS, REVISION, remark, training_free
from benchmarks.patchrank.rows import (
    BASELINES,
    ORACLE,
    ROWS,
    TRANSFERRED,
    Known,
    correct,
    name_of_tuned,
    planned,
    tuned,
)
from benchmarks.patchrank.runs import COMMAND, KINDS, results
from benchmarks.patchrank.tasks import FASHION, KEEP, PLAIN, PRUNE_LAYER, STYLES, TASKS, Task
from benchmarks.printed import paper_numbers
from common.clip import CLIP
from common.conditions import conditions
from common.timing import seconds
from patchrank.predictor import RankPredictor
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

BATCHES = (1, 32)
OUR_BEST = name_of_tuned("coupled", KEEP)
_STYLES = [task.name for task in STYLES]


def run(smoke: bool = False) -> dict[str, Any]:
    """The table from the finished runs, with times measured now. smoke: the same, fewer rounds."""
    known = results()
    read = "test, read once; tuned rows a second time, after their prompts' start was changed"
    setting = conditions(
        "embedded", dtype="float32", keep=KEEP, prune_layer=PRUNE_LAYER, chosen_on="val", reported_on=read
    )
    found = [run["conditions"] for name, run in known.items() if name.endswith("-baselines")]
    setting["reducers"] = min((run.get("reducers", 1) for run in found), default=REVISION)
    rows = [_row(known, name) for name in ROWS]
    for row, seconds_by_batch in zip(rows, times(1 if smoke else 15), strict=True):
        row["seconds"] = seconds_by_batch
    return {"name": "patchrank-table1", "conditions": setting, "rows": rows, "headline": headline(known)}


def _row(known: Known, name: str) -> dict[str, Any]:
    """A row's accuracies by task, its cost, and how far it is behind Patch Ranking, untuned and tuned."""
    by_task = {task.name: entries for task in TASKS if (entries := ROWS[name].entries_of(task, known))}
    costs = [entry["gmacs"] for task in _STYLES for entry in by_task.get(task, [])]
    fashion = by_task.get(FASHION.name)
    return {
        "row": name,
        "accuracy": {task: [entry["accuracy"] for entry in entries] for task, entries in by_task.items()},
        "pictures": {task: entries[0]["pictures"] for task, entries in by_task.items()},
        "gmacs": fmean(costs) if costs else None,
        "fashion_gmacs": fmean(entry["gmacs"] for entry in fashion) if fashion else None,
        "behind": None if name == OURS else difference(known, OURS, name),
        "behind_tuned": None if name == OUR_BEST else difference(known, OUR_BEST, name),
    }


def difference(known: Known, first: str, second: str) -> tuple[float, float, float] | None:
    """Accuracy of one row minus that of another, averaged over the style tasks, with its interval; None: not run."""
    sides = [[ROWS[name].entries_of(task, known) for task in STYLES] for name in (first, second)]
    if not all(entries for side in sides for entries in side):
        return None
    return paired_interval(*([correct(entries) for entries in side] for side in sides))


def headline(known: Known) -> dict[str, Any] | None:
    """The accuracy that pruning costs after tuning, by task and averaged: tuned and pruned minus tuned and unpruned.

    The unpruned model has the better of the two kinds of prompts, by val. None: not all style tasks were run.
    """
    pruned, unpruned, chosen = {}, {}, {}
    for task in TASKS:
        val = {kind: _val_accuracy(known, task, kind) for kind in KINDS}
        entries = tuned("coupled", KEEP).entries_of(task, known)
        if not entries or None in val.values():
            continue
        chosen[task.name] = max(val, key=val.get)
        pruned[task.name] = correct(entries)
        unpruned[task.name] = correct(tuned(chosen[task.name], 1.0).entries_of(task, known))
    if not set(_STYLES) <= pruned.keys():
        return None
    return {
        "unpruned": {name: name_of_tuned(kind, 1.0) for name, kind in chosen.items()},
        "tasks": {name: paired_interval([pruned[name]], [unpruned[name]]) for name in pruned},
        "styles": paired_interval([pruned[name] for name in _STYLES], [unpruned[name] for name in _STYLES]),
        "all": paired_interval(list(pruned.values()), list(unpruned.values())),
        "seeds": min(len(right) for right in pruned.values()),
    }


def _val_accuracy(known: Known, task: Task, kind: str) -> float | None:
    """Mean accuracy on val of one kind of prompts, tuned without pruning; None: not run."""
    names = tuned(kind, 1.0).files(task)
    return mean([known[name]["val"]["1.0"]["accuracy"] for name in names if name in known])


def towers(clip: CLIP) -> dict[str, nn.Module | None]:
    """The image tower of each row, for its time, which does not depend on weights.

    A-ViT has None: its tokens are masked and not removed, so its time says nothing.
    """
    tower = clip.image_tower
    free = training_free(tower, KEEP, PRUNE_LAYER)
    predictor, width = RankPredictor.for_tower(tower), tower.conv1.out_channels

    def prompted(kind: str, keep: float) -> nn.Module:
        prompts = Prompts("independent" if kind == "coupled" else kind, 2, 2, width, width)
        return PatchRankTower(tower, predictor, keep, PRUNE_LAYER, prompts)

    by_row: dict[str, nn.Module | None] = dict.fromkeys(ROWS)
    by_row |= {DENSE: tower, "random": free["given scores"], ORACLE: free["given scores"]}
    by_row |= {name: free[name] for name in BASELINES if name in free}
    by_row |= dict.fromkeys((OURS, TRANSFERRED), PatchRankTower(tower, predictor, KEEP, PRUNE_LAYER))
    return by_row | {name_of_tuned(kind, keep): prompted(kind, keep) for keep in (1.0, KEEP) for kind in KINDS}


def times(rounds: int) -> list[dict[str, float] | None]:
    """Seconds a batch of each row's embedded image tower, by batch size; None without a time.

    Each is the median over alternating rounds.
    """
    clip = STYLES[0].clip()
    built, size = towers(clip), clip.image_tower.image_size
    images = torch.randn(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))
    by_row: dict[str, dict[str, float]] = {name: {} for name in built}
    for batch in BATCHES:
        calls = {name: partial(tower, images[:batch]) for name, tower in built.items() if tower is not None}
        for name, median in seconds(calls, rounds).items():
            by_row[name][str(batch)] = median
    return [by_row[name] or None for name in ROWS]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows = {row["row"]: row for row in result["rows"]}
    dense = rows[DENSE]
    head = [
        "method", *(task.name for task in TASKS), "mean of the three styles", f"{OURS} leads by", "tuned, it leads by",
        "GMACs", "saved", *(f"ms, batch {batch}" for batch in BATCHES), "paper, mean of 8 sets",
    ]  # fmt: skip
    cells = [_cells(row, dense) for name, row in rows.items() if name != ORACLE]
    oracle, *others = _cells(rows[ORACLE], dense)
    cells.append([f"*oracle:* {oracle}", *others])
    parts = [table(head, cells), _headline(result["headline"]), _paper_table(), _reading(result)]
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
    cells = [percent(row["accuracy"][task.name]) if task.name in row["accuracy"] else "not run" for task in TASKS]
    if row["row"] == TRANSFERRED:
        cells[-1] = "–"  # another tower
    styles = [row["accuracy"].get(name) for name in _STYLES]
    average = f"{100 * fmean(map(fmean, styles)):.1f}" if all(styles) else "not run"
    cost = ["not run", "not run"]
    if row["gmacs"]:
        cost = [f"{row['gmacs']:.4f}", saved(row["gmacs"], dense["gmacs"])]
    times = [f"{1000 * row['seconds'][str(batch)]:.2f}" if row["seconds"] else "–" for batch in BATCHES]
    printed = {line["row"]: f"{fmean(line['accuracy']):.1f}" for line in paper_numbers("patchrank")["table1"]}
    behind = [points(row["behind"]), points(row["behind_tuned"])]
    return [row["row"], *cells, average, *behind, *cost, *times, printed.get(row["row"], "–")]


def _headline(headline: dict[str, Any] | None) -> str:
    if headline is None:
        return f"Headline: not run (`{COMMAND}`)."
    by_task = ", ".join(f"{name} {points(change)}" for name, change in headline["tasks"].items())
    means = f"mean of the three styles {points(headline['styles'])}"
    if len(headline["tasks"]) > len(_STYLES):
        means += f", of all {len(headline['tasks'])} tasks {points(headline['all'])}"
    return (
        f"**Headline**: at keep {KEEP}, {OUR_BEST} against the unpruned model tuned likewise (the better of the two "
        f"kinds of prompts by val), in points: {means}; {by_task}. Mean over {headline['seeds']} training seeds, 95 % "
        f"paired bootstrap over pictures. The paper states a loss of {paper_numbers('patchrank')['loss']} "
        "points over seven data sets."
    )


def _paper_table() -> str:
    printed = paper_numbers("patchrank")
    rows = [
        [row["method"], *(f"{value:.1f}" for value in (*row["accuracy"], fmean(row["accuracy"])))]
        for row in printed["table1"]
    ]
    note = (
        f"The paper's rows all stand under “Avg. GFLOPs {printed['gflops']}”, which cannot be the pruned image tower: "
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
    incomplete = any(not row["accuracy"] for row in result["rows"]) or len(shown) < len(TASKS)
    (shots,) = {task.shots for task in STYLES}
    waiting = f" Not run yet: `{COMMAND}` (Fashion-MNIST needs EFFCLIP_DATA and its CLIP)." if incomplete else ""
    return (
        f"Embedded scale, keep {setting['keep']}, pruned before block {setting['prune_layer']}: a quarter of the "
        "depth, as block 3 of 12 (a third in Fashion-MNIST's tower of 3 blocks). Top-1 in %, mean ± standard deviation "
        f"over up to {seeds} training seeds (random: draws); test pictures: {pictures}. Leads are in points, over the "
        "three styles, with 95 % paired bootstrap over pictures: Patch Ranking with the task's own predictor, untuned, "
        "and with text and visual prompts tuned at keep 0.6. Predictors and A-ViT learn from "
        f"{shots} unlabelled pictures a name (Fashion-MNIST: {FASHION.shots}; the predictor for all: {PLAIN.shots} of "
        "each seen name), prompts from 16 shots. GMACs (attention on both sides) and what they save are the embedded "
        f"tower's{_fashion(result)}; A-ViT's are measured means, and it is run masked, so its time says nothing. The "
        "oracle (greedy, 3 rounds) ranks the test pictures themselves: no method, a bound. "
        f"{setting['dtype']} on {setting['device']}, {setting['threads']} threads, torch {setting['torch']}."
        f"{remark(setting)}{waiting}"
    )


def _fashion(result: dict[str, Any]) -> str:
    """The rows' savings on Fashion-MNIST's tower, which has one block less; empty where that task was not run."""
    costs = {row["row"]: row["fashion_gmacs"] for row in result["rows"] if row["fashion_gmacs"]}
    rows = (*BASELINES, OURS)
    if not {DENSE, *rows} <= costs.keys():
        return ""
    return f" (of Fashion-MNIST's: {', '.join(f'{name} {saved(costs[name], costs[DENSE])}' for name in rows)})"


def _draw(result: dict[str, Any]) -> Figure:
    """Mean accuracy over the style tasks against GMACs: one point for each row."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for row in result["rows"]:
        styles = [row["accuracy"].get(name) for name in _STYLES]
        if not all(styles):
            continue
        # Seven colours, and for the rows after them other marks.
        mark = "*" if row["row"] == ORACLE else "os^"[len(axes.lines) // len(COLOURS)]
        axes.plot(row["gmacs"], 100 * fmean(map(fmean, styles)), mark, label=row["row"])
    axes.set(title=f"three styles, keep {KEEP}, embedded scale", xlabel="GMACs a picture", ylabel="top-1, %")
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

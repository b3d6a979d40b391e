"""Patch Ranking's table: methods x tasks at one keep rate, with costs; and the headline, the loss that tuning leaves.

Accuracies are those of the finished runs (``benchmarks.patchrank.runs``); times are measured here.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.cells import Comparison, Result, missing_runs, percent, points, saved
from benchmarks.patchrank.costs import training_free
from benchmarks.patchrank.rows import (
    BASELINES,
    COMMAND,
    DENSE,
    ORACLE,
    OURS,
    ROWS,
    TRANSFERRED,
    Known,
    correct,
    name_of_tuned,
    planned,
    tuned,
)
from benchmarks.patchrank.runs import KINDS, results
from benchmarks.patchrank.tasks import FASHION, KEEP, PLAIN, PRUNE_LAYER, STYLES, TASKS, Task, paired
from benchmarks.printed import paper_numbers
from benchmarks.timing import seconds
from common.clip import CLIP
from common.conditions import conditions
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
    stated = conditions(
        "embedded", dtype="float32", keep=KEEP, prune_layer=PRUNE_LAYER, chosen_on="val", reported_on=read
    )
    rows = [_row(known, name) for name in ROWS]
    for row, taken in zip(rows, times(1 if smoke else 15), strict=True):
        row["seconds"] = taken
    return {"name": "patchrank-table1", "conditions": stated, "rows": rows, "headline": headline(known)}


def _row(known: Known, name: str) -> dict[str, Any]:
    """A row's accuracies by task, its cost, and its distance from Patch Ranking untuned and tuned."""
    found = {task.name: ROWS[name].of(known, task) for task in TASKS}
    costs = [entry["gmacs"] for task in _STYLES for entry in found[task]]
    return {
        "row": name,
        "accuracy": {task: [entry["accuracy"] for entry in entries] for task, entries in found.items() if entries},
        "pictures": {task: entries[0]["pictures"] for task, entries in found.items() if entries},
        "gmacs": fmean(costs) if costs else None,
        "fashion_gmacs": fmean(entry["gmacs"] for entry in found[FASHION.name]) if found[FASHION.name] else None,
        "behind": None if name == OURS else difference(known, OURS, name),
        "behind_tuned": None if name == OUR_BEST else difference(known, OUR_BEST, name),
    }


def difference(known: Known, first: str, second: str) -> tuple[float, float, float] | None:
    """Accuracy of one row minus that of another, mean over the style tasks, with its interval; None: not all run."""
    sides = [[ROWS[name].of(known, task) for task in STYLES] for name in (first, second)]
    if not all(entries for side in sides for entries in side):
        return None
    return paired(*([correct(entries) for entries in side] for side in sides))


def headline(known: Known) -> dict[str, Any] | None:
    """What pruning costs after tuning, by task and in the mean: tuned and pruned against tuned and unpruned.

    Unpruned means the better of the two kinds of prompts, by val. None: not all of the style tasks were run.
    """
    pruned, whole, chosen = {}, {}, {}
    for task in TASKS:
        of_val = {kind: _of_val(known, task, kind) for kind in KINDS}
        entries = tuned("coupled", KEEP).of(known, task)
        if not entries or None in of_val.values():
            continue
        chosen[task.name] = max(of_val, key=of_val.get)
        pruned[task.name] = correct(entries)
        whole[task.name] = correct(tuned(chosen[task.name], 1.0).of(known, task))
    if not set(_STYLES) <= pruned.keys():
        return None
    alone = {name: paired([pruned[name]], [whole[name]]) for name in pruned}
    return {
        "unpruned": {name: name_of_tuned(kind, 1.0) for name, kind in chosen.items()},
        "tasks": alone,
        "styles": paired([pruned[name] for name in _STYLES], [whole[name] for name in _STYLES]),
        "all": paired(list(pruned.values()), list(whole.values())),
        "seeds": min(len(right) for right in pruned.values()),
    }


def _of_val(known: Known, task: Task, kind: str) -> float | None:
    """Mean accuracy on val of one kind of prompts, tuned without pruning."""
    source = tuned(kind, 1.0)
    found = [known[name]["val"]["1.0"]["accuracy"] for name in source.files(task) if name in known]
    return fmean(found) if found else None


def towers(clip: CLIP) -> dict[str, nn.Module | None]:
    """The image tower of each row, for its time, which weights do not change. A-ViT's is masked and has none."""
    tower = clip.image_tower
    free = training_free(tower, KEEP, PRUNE_LAYER)
    predictor, width = RankPredictor.for_tower(tower), tower.conv1.out_channels

    def prompted(kind: str, keep: float) -> nn.Module:
        prompts = Prompts("independent" if kind == "coupled" else kind, 2, 2, width, width)
        return PatchRankTower(tower, predictor, keep, PRUNE_LAYER, prompts)

    found: dict[str, nn.Module | None] = dict.fromkeys(ROWS)
    found |= {DENSE: tower, "random": free["given scores"], ORACLE: free["given scores"]}
    found |= {name: free[name] for name in BASELINES if name in free}
    found |= dict.fromkeys((OURS, TRANSFERRED), PatchRankTower(tower, predictor, KEEP, PRUNE_LAYER))
    return found | {name_of_tuned(kind, keep): prompted(kind, keep) for keep in (1.0, KEEP) for kind in KINDS}


def times(rounds: int) -> list[dict[str, float] | None]:
    """Seconds a batch of each row's embedded image tower, by batch size; medians over alternating rounds."""
    clip = STYLES[0].clip()
    built, size = towers(clip), clip.image_tower.image_size
    images = torch.randn(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))
    taken: dict[str, dict[str, float]] = {name: {} for name in built}
    for batch in BATCHES:
        calls = {name: partial(made, images[:batch]) for name, made in built.items() if made is not None}
        for name, spent in seconds(calls, rounds).items():
            taken[name][str(batch)] = spent
    return [taken[name] or None for name in ROWS]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows = {row["row"]: row for row in result["rows"]}
    dense = rows[DENSE]
    head = [
        "method", *(task.name for task in TASKS), "mean of the three styles", f"{OURS} leads by", "tuned, it leads by",
        "GMACs", "saved", *(f"ms, batch {batch}" for batch in BATCHES), "paper, mean of 8 sets",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(_cells(row, dense))} |" for name, row in rows.items() if name != ORACLE]
    lines += [f"| *oracle:* {' | '.join(_cells(rows[ORACLE], dense))} |"]
    parts = ["\n".join(lines), _headline(result["headline"]), _paper_table(), _reading(result)]
    return {"md": "\n\n".join(parts) + "\n", "figures": {"patchrank-table1": _draw(result)}}


def _cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    cells = [percent(row["accuracy"][task.name]) if task.name in row["accuracy"] else "not run" for task in TASKS]
    if row["row"] == TRANSFERRED:
        cells[-1] = "–"  # another tower
    styles = [row["accuracy"].get(name) for name in _STYLES]
    mean = f"{100 * fmean(fmean(found) for found in styles):.1f}" if all(styles) else "not run"
    cost = ["not run", "not run"]
    if row["gmacs"]:
        cost = [f"{row['gmacs']:.4f}", saved(row["gmacs"], dense["gmacs"])]
    taken = [f"{1000 * row['seconds'][str(batch)]:.2f}" if row["seconds"] else "–" for batch in BATCHES]
    printed = {of["row"]: f"{fmean(of['accuracy']):.1f}" for of in paper_numbers("patchrank")["table1"]}
    behind = [points(row["behind"]), points(row["behind_tuned"])]
    return [row["row"], *cells, mean, *behind, *cost, *taken, printed.get(row["row"], "–")]


def _headline(found: dict[str, Any] | None) -> str:
    if found is None:
        return f"Headline: not run (`{COMMAND}`)."
    alone = ", ".join(f"{name} {points(change)}" for name, change in found["tasks"].items())
    said = f"mean of the three styles {points(found['styles'])}"
    if len(found["tasks"]) > len(_STYLES):
        said += f", of all {len(found['tasks'])} tasks {points(found['all'])}"
    return (
        f"**Headline**: at keep {KEEP}, {OUR_BEST} against the unpruned model tuned likewise (the better of the two "
        f"kinds of prompts by val), in points: {said}; {alone}. Mean over {found['seeds']} training seeds, 95 % "
        f"paired bootstrap over pictures. The paper states a loss of {paper_numbers('patchrank')['loss']} "
        "points over seven data sets."
    )


def _paper_table() -> str:
    printed = paper_numbers("patchrank")
    lines = [f"| paper, other data | {' | '.join(printed['sets'])} | mean |", f"|---|{'---:|' * 9}"]
    for row in printed["table1"]:
        cells = [f"{value:.1f}" for value in (*row["accuracy"], fmean(row["accuracy"]))]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    note = (
        f"The paper's rows all stand under “Avg. GFLOPs {printed['gflops']}”, which cannot be the pruned image tower: "
        "that is what ViT-B/16 costs with all its tokens (16.87 without attention's products). Keeping 60 % from "
        "block 3 on costs 11.9 (12.3 with them), see `make reproduce-patchrank-costs`. Neither its keep rate, nor its "
        "shots, nor whether its rows are tuned is stated."
    )
    return "\n".join([*lines, "", note])


def _reading(result: dict[str, Any]) -> str:
    stated = result["conditions"]
    seeds = max((len(found) for row in result["rows"] for found in row["accuracy"].values()), default=0)
    shown = {task: count for row in result["rows"] for task, count in row["pictures"].items()}
    pictures = ", ".join(f"{task} {count:,}" for task, count in shown.items()) or "none yet"
    missing = any(not row["accuracy"] for row in result["rows"]) or len(shown) < len(TASKS)
    (shots,) = {task.shots for task in STYLES}
    waiting = f" Not run yet: `{COMMAND}` (Fashion-MNIST needs EFFCLIP_DATA and its CLIP)." if missing else ""
    return (
        f"Embedded scale, keep {stated['keep']}, pruned before block {stated['prune_layer']}: a quarter of the depth, "
        "as block 3 of 12 (a third in Fashion-MNIST's tower of 3 blocks). Top-1 in %, mean ± standard deviation over "
        f"up to {seeds} training seeds (random: draws); test pictures: {pictures}. Leads are in points, over the three "
        "styles, with 95 % paired bootstrap over pictures: Patch Ranking with the task's own predictor, untuned, "
        "and with text and visual prompts tuned at keep 0.6. Predictors and A-ViT learn from "
        f"{shots} unlabelled pictures a name (Fashion-MNIST: {FASHION.shots}; the predictor for all: {PLAIN.shots} of "
        "each seen name), prompts from 16 shots. GMACs (attention on both sides) and what they save are the embedded "
        f"tower's{_fashion(result)}; A-ViT's are measured means, and it is run masked, so its time says nothing. The "
        "oracle (greedy, 3 rounds) ranks the test pictures themselves: no method, a bound. "
        f"{stated['dtype']} on {stated['device']}, {stated['threads']} threads, torch {stated['torch']}.{waiting}"
    )


def _fashion(result: dict[str, Any]) -> str:
    """What the rows save of Fashion-MNIST's tower, which has a block less; nothing where none was run on it."""
    costs = {row["row"]: row["fashion_gmacs"] for row in result["rows"] if row["fashion_gmacs"]}
    rows = (*BASELINES, OURS)
    if not {DENSE, *rows} <= costs.keys():
        return ""
    return f" (of Fashion-MNIST's: {', '.join(f'{name} {saved(costs[name], costs[DENSE])}' for name in rows)})"


def _draw(result: dict[str, Any]) -> Figure:
    """Mean accuracy over the style tasks against GMACs, one point a row."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for row in result["rows"]:
        styles = [row["accuracy"].get(name) for name in _STYLES]
        if not all(styles):
            continue
        style = "k*" if row["row"] == ORACLE else "s" if row["row"] in BASELINES else "o"
        axes.plot(row["gmacs"], 100 * fmean(fmean(found) for found in styles), style, label=row["row"])
    axes.set(title=f"three styles, keep {KEEP}, embedded scale", xlabel="GMACs a picture", ylabel="top-1, %")
    if axes.lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def compare(result: Result) -> Iterator[Comparison]:
    """Means over data sets, and the loss that tuning leaves."""
    known = {row["row"]: row["accuracy"] for row in result["rows"]}
    printed = {row["row"]: row for row in paper_numbers("patchrank")["table1"]}
    for name, row in printed.items():
        tasks = known.get(name, {})
        ours = 100 * fmean(fmean(seeds) for seeds in tasks.values()) if tasks else None
        yield Comparison(
            f"{row['method']} at one keep rate, mean over data sets", fmean(row["accuracy"]), ours, "%", False
        )
    lost = result["headline"] and -100 * result["headline"]["all"][0]
    yield Comparison(
        "lost by dropping 40 % of the patches, after tuning", paper_numbers("patchrank")["loss"], lost, "points", False
    )


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings that were not run; a row's tasks have as many seeds as the one that has the fewest."""
    rows = (
        (row["row"], min(map(len, row["accuracy"].values()), default=0), planned(row["row"])) for row in result["rows"]
    )
    yield from missing_runs(rows, COMMAND)

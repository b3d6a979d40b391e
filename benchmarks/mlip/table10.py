"""MLIP's Table 10: what a training step of every row takes, and accuracy for the time, beside the paper's.

Shapes: B pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.cells import Comparison, Result, mean, missing_runs, percent
from benchmarks.embedded import GUIDE
from benchmarks.mlip import ablations
from benchmarks.mlip.ablations import RECIPE, ROWS, runs
from benchmarks.mlip.models import needing, not_run
from benchmarks.printed import paper_numbers
from benchmarks.speed.training import train_step
from benchmarks.timing import alternate, ratio
from benchmarks.training.drift import built
from common.data.embedded.module import EmbeddedDataModule

ROUNDS = 7
REFERENCE = "clip"


def run(smoke: bool = False) -> dict[str, Any]:
    """Seconds of a step of every row, in alternating rounds, and the rows' accuracies as far as they were run.

    smoke: two rows, two rounds, 16 pairs. Where there is no Guide: the command that trains it.
    """
    names = (
        [REFERENCE, "mlip"] if smoke else [name for name, changed in ROWS.items() if "train_fraction" not in changed]
    )
    rounds, pairs = (2, 16) if smoke else (ROUNDS, None)
    return needing(
        "mlip-table10", (GUIDE,), lambda: _measure(names, rounds, pairs), dtype="bfloat16 autocast", rounds=rounds
    )


def _measure(names: list[str], rounds: int, pairs: int | None) -> dict[str, Any]:
    chosen = dict(zip(names, runs(names), strict=False))  # those of the first seed, which come first
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = {name: built(RECIPE, run.settings)[0].to(device) for name, run in chosen.items()}
    batch = _batch(pairs, device)
    steps = {name: train_step(module, batch, torch.bfloat16) for name, module in modules.items()}
    taken, known = alternate(steps, rounds), ablations.results()
    rows = [
        {
            "run": name,
            "seconds": taken[name]["seconds"],
            "of_reference": ratio(taken[name], taken[REFERENCE]),
            "steps": known[name][0]["steps"] if known[name] else chosen[name].steps,
            "seeds": [found["test"]["top1"]["accuracy"] for found in known[name]],
        }
        for name in names
    ]
    return {
        "batch": len(batch["image"]),
        "rows": rows,
        "planned": len(ablations.SEEDS),
        "paper": paper_numbers("mlip")["table10"],
    }


def _batch(pairs: int | None, device: str) -> dict[str, Tensor]:
    """The first batch of ``val`` as training reads it, or the first pairs of it."""
    said = yaml.safe_load((ablations.ROOT / RECIPE).read_text())["data"]["init_args"]
    data = EmbeddedDataModule(**said | {"num_workers": 0})
    batch = next(iter(data.dataloader("val", train=True)))
    return {name: batch[name][:pairs].to(device) for name in ("image", "text", "caption_id")}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    if missing := not_run(result):
        return missing
    lines = [
        "| paper: ViT-B/16 on CC3M | zero-shot | GPU hours | zero-shot / hours of all GPUs |",
        "|---|---:|---:|---:|",
    ]
    for row in result["paper"]:
        lines.append(f"| {row['method']} | {row['accuracy']:.1f} | {row['gpu_hours']} | {row['ratio']:.2f} |")
    lines += [
        "",
        f"| embedded row | s a step | of {REFERENCE}'s | minutes for its steps | seeds | zero-shot | of it a minute |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        minutes, seeds = row["seconds"] * row["steps"] / 60, row["seeds"]
        reached = [percent(seeds), f"{100 * fmean(seeds) / minutes:.1f}"] if seeds else ["not run", "not run"]
        measured = f"{row['seconds']:.3f} | {row['of_reference']:.2f} | {minutes:.2f}"
        lines.append(f"| {row['run']} | {measured} | {len(seeds)} | {' | '.join(reached)} |")
    stated = result["conditions"]
    incomplete = any(len(row["seeds"]) < result["planned"] for row in result["rows"])
    note = (
        f"Steps (forward, backward, clipped AdamW) of {result['batch']} pairs, {stated['dtype']}, medians of "
        f"{stated['rounds']} rounds in which all rows take turns in one process; {stated['device']}, "
        f"{stated['threads']} threads, torch {stated['torch']}. Reading pictures is not part of a step. Accuracies are "
        "the ablations', on embedded `test`, mean ± standard deviation over their seeds. The paper prints MLIP's row "
        "shifted by a column, and its text calls 370 GPU hours fewer than 361. SLIP and DeCLIP are not part of this "
        "suite."
    )
    if incomplete:
        note += f" Not all of {result['planned']} seeds were run: `{ablations.COMMAND}`."
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {}}


def compare(result: Result) -> Iterator[Comparison]:
    """What is printed; then MLIP beside CLIP, all of its time that an embedded step on another machine can say."""
    printed, ours = ({row[key]: row for row in result[of]} for of, key in (("paper", "method"), ("rows", "run")))
    reached = {run: mean(row["seeds"]) for run, row in ours.items()}
    for method, row in printed.items():
        found = reached.get(row.get("run"))
        yield Comparison(f"{method}, zero-shot", row["accuracy"], found and 100 * found, "%", "run" not in row)
        yield Comparison(f"{method}, training", row["gpu_hours"], None, "GPU hours")
        yield Comparison(f"{method}, zero-shot for the hours of all GPUs", row["ratio"], None, "% an hour")
    clip, mlip, slower = printed["CLIP"], printed["MLIP"], ours["mlip"]["of_reference"]
    what = "MLIP's training, in CLIP's time (ours: a step's)"
    yield Comparison(what, mlip["gpu_hours"] / clip["gpu_hours"], slower, "times", False)
    worth = reached["mlip"] / reached["clip"] / slower if reached["mlip"] and reached["clip"] else None
    yield Comparison("MLIP's zero-shot for its time, in CLIP's", mlip["ratio"] / clip["ratio"], worth, "times", False)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The rows' trainings that were not run."""
    rows = ((row["run"], len(row["seeds"]), result["planned"]) for row in result["rows"])
    yield from missing_runs(rows, ablations.COMMAND)

"""MLIP's Table 10: what a training step of every row takes, and accuracy for the time, beside the paper's.

Shapes: B pairs.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import mlip_ablations
from benchmarks.drift import built
from benchmarks.embedded import GUIDE
from benchmarks.mlip_ablations import RECIPE, ROWS, runs
from benchmarks.mlip_models import needing, not_run
from benchmarks.mlip_speed import train_step
from benchmarks.mlip_table9 import paper
from benchmarks.mlip_tables import spread
from benchmarks.timing import alternate, ratio
from common.data.embedded import EmbeddedDataModule

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
    taken, known = alternate(steps, rounds), mlip_ablations.results()
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
        "planned": len(mlip_ablations.SEEDS),
        "paper": paper()["table10"],
    }


def _batch(pairs: int | None, device: str) -> dict[str, Tensor]:
    """The first batch of ``val`` as training reads it, or the first pairs of it."""
    said = yaml.safe_load((mlip_ablations.ROOT / RECIPE).read_text())["data"]["init_args"]
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
        reached = [spread(seeds), f"{100 * fmean(seeds) / minutes:.1f}"] if seeds else ["not run", "not run"]
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
        note += f" Not all of {result['planned']} seeds were run: `{mlip_ablations.COMMAND}`."
    return {"md": "\n".join([*lines, "", note]) + "\n", "figures": {}}

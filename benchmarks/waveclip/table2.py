"""WAVECLIP's Table 2: the costs of all ten rows at paper scale, accuracies on request; then the embedded block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cells import Comparison, Result
from benchmarks.printed import paper_numbers
from benchmarks.waveclip.costs import Cost, exit_costs, expected
from benchmarks.waveclip.imagenet import row_accuracies
from benchmarks.waveclip.rivals import BASELINES, TEACHER, WAVECLIP
from benchmarks.waveclip.table2_embedded import markdown, measure
from common.conditions import conditions
from common.flops import count_macs
from waveclip.tower import WaveTower

COMMAND = "IMAGENET=DIR WEIGHTS=DIR make reproduce-table2"
"""The command that fills the accuracy column at paper scale."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Both blocks; accuracies at paper scale where IMAGENET and WEIGHTS are set in the environment.

    smoke: the embedded block on few images; the counts take seconds anyway.
    ValueError: only one of the two is set, ``row_accuracies`` cannot use them, or the committed weights are missing.
    """
    imagenet, weights = os.environ.get("IMAGENET"), os.environ.get("WEIGHTS")
    if bool(imagenet) != bool(weights):
        raise ValueError(f"IMAGENET={imagenet} and WEIGHTS={weights}: set both or neither")
    run_conditions = conditions("paper", seeds=None, dtype="float32", batch=1, weights=weights or "random (costs only)")
    block = paper_scale(imagenet, weights)
    shares = {
        row["method"].split()[0].removeprefix("WAVECLIP-"): row["refined"]
        for row in paper_numbers("waveclip")["table2"]
        if "refined" in row
    }
    return {
        "name": "table2",
        "conditions": run_conditions,
        "paper_scale": block,
        "embedded": measure(shares, smoke),
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    blocks = paper_scale_markdown(result["paper_scale"]), markdown(result["embedded"])
    return {"md": "\n".join(blocks), "figures": {}}


def paper_scale(imagenet: str | None = None, weights: str | None = None) -> dict[str, Any]:
    """Every row of the paper's table, and the point of its running text, beside our counts of the architectures.

    Returns {"rows": [...], "savings": {...}}. A row holds the paper's ``paper_tokens``, ``paper_gflops`` and
    ``paper_accuracy``; our expected ``tokens``, ``gmacs_paper`` and ``gmacs`` (see common.flops); the distance of
    each count from the paper's in % (``difference_paper``, ``difference``); and ``accuracy`` by ``row_accuracies``,
    or None. ``savings`` are those of WAVECLIP-high in %: as the paper states it, and with both sides counted alike.
    """
    numbers = paper_numbers("waveclip")
    rows_printed = numbers["table2"] + numbers["prose"]
    costs = _row_costs(rows_printed)
    accuracies = row_accuracies(rows_printed, imagenet, weights) if imagenet and weights else [None] * len(rows_printed)
    rows = [
        {
            "method": row["method"],
            "refined": row.get("refined"),
            "paper_tokens": row["tokens"],
            "paper_gflops": row["gflops"],
            "paper_accuracy": row["accuracy"],
            "tokens": cost.tokens,
            "gmacs_paper": cost.macs.gmacs_paper,
            "gmacs": cost.macs.gmacs,
            "difference_paper": 100 * (cost.macs.gmacs_paper / row["gflops"] - 1),
            "difference": 100 * (cost.macs.gmacs / row["gflops"] - 1),
            "accuracy": accuracy,
            "note": BASELINES[row["model"]].note if row["model"] in BASELINES else "",
        }
        for row, cost, accuracy in zip(rows_printed, costs, accuracies, strict=True)
    ]
    dense = next(cost for row, cost in zip(rows_printed, costs, strict=True) if row["model"] == TEACHER)
    high = next(cost for row, cost in zip(rows_printed, costs, strict=True) if "high" in row["method"])
    printed_high = next(row["gflops"] for row in rows_printed if "high" in row["method"])
    savings = {
        "stated": numbers["savings"]["high"],
        "stated_like_for_like": _saving(printed_high, dense.macs.gmacs),
        "gmacs_paper": _saving(high.macs.gmacs_paper, dense.macs.gmacs_paper),
        "gmacs": _saving(high.macs.gmacs, dense.macs.gmacs),
    }
    return {"rows": rows, "savings": savings}


def _saving(cost: float, dense: float) -> float:
    return 100 * (1 - cost / dense)


def _row_costs(rows: list[dict[str, Any]]) -> list[Cost]:
    """The cost of each row: its architecture's, or for WAVECLIP the mean over its two exits."""
    costs: dict[str, list[Cost]] = {}
    for name, baseline in BASELINES.items():
        tower = baseline.countable_tower()
        example = torch.zeros(1, 3, baseline.image_size, baseline.image_size)
        costs[name] = [Cost(baseline.tokens, count_macs(tower, example))]
        if name == TEACHER:
            costs[WAVECLIP] = exit_costs(WaveTower.from_image_tower(tower, levels=1), baseline.image_size)
    return [
        expected(costs[WAVECLIP], (1 - row["refined"], row["refined"])) if "refined" in row else costs[row["model"]][0]
        for row in rows
    ]


def paper_scale_markdown(block: dict[str, Any]) -> str:
    """The block as a Markdown table, and the notes to it."""
    lines = [
        "| method | tokens, paper | tokens | GFLOPs, paper | GMACs without attention products | GMACs "
        "| accuracy, paper | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in block["rows"]:
        lines.append(
            f"| {row['method']} | {_number(row['paper_tokens'])} | {_number(row['tokens'])} "
            f"| {row['paper_gflops']:.2f} "
            f"| {row['gmacs_paper']:.2f} ({_percent(row['difference_paper'])}) "
            f"| {row['gmacs']:.2f} ({_percent(row['difference'])}) "
            f"| {row['paper_accuracy']:.1f} | {_accuracy(row['accuracy'])} |"
        )
    return "\n".join([*lines, "", *_notes(block)]) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _percent(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f} %"  # the sum turns -0.0 into 0.0


def _accuracy(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    low, high = result["interval"]
    return f"{result['top1']:.1f} [{low:.1f}, {high:.1f}], {result['images']:,} images"


def _notes(block: dict[str, Any]) -> list[str]:
    savings = block["savings"]
    shares = ", ".join(f"{row['refined']:.3f}" for row in block["rows"] if row["refined"] is not None)
    notes = [
        "Scale: paper (224 px); costs need no trained weights. Percentages in brackets are the distance from "
        "the paper's GFLOPs, which are multiply-adds. WAVECLIP's rows take the share of refined pictures "
        f"that the printed tokens imply, with 148 new tokens: {shares} in the table's order.",
        "The paper mixes two accounts: its baselines are counted without the two matrix products inside "
        "attention, its WAVECLIP rows fit only with them. The saving at WAVECLIP-high is stated as "
        f"{savings['stated']:.1f} %; the same cost against a dense tower counted alike saves "
        f"{savings['stated_like_for_like']:.1f} %. Our counts save {savings['gmacs']:.1f} % with attention "
        f"on both sides and {savings['gmacs_paper']:.1f} % without.",
        *(f"{row['method']}: {row['note']}." for row in block["rows"] if row["note"]),
    ]
    if any(row["accuracy"] is None for row in block["rows"]):
        notes.append(f"Accuracies that were not run: `{COMMAND}` (file names: benchmarks/waveclip/rivals.py).")
    return "\n\n".join(notes).split("\n")


def compare(result: Result) -> Iterator[Comparison]:
    """Tokens, costs, accuracies and savings of every row."""
    for row in result["paper_scale"]["rows"]:
        method = row["method"]
        if row["paper_tokens"] is not None and row["tokens"] is not None:
            yield Comparison(method, row["paper_tokens"], row["tokens"], "tokens")
        yield Comparison(f"{method}, with attention's products", row["paper_gflops"], row["gmacs"], "GMACs")
        yield Comparison(f"{method}, without", row["paper_gflops"], row["gmacs_paper"], "GMACs")
        ours = row["accuracy"] and row["accuracy"]["top1"]
        yield Comparison(f"{method}, top-1", row["paper_accuracy"], ours, "%")
    costs = {row["method"]: row["gmacs"] for row in result["paper_scale"]["rows"]}
    printed = paper_numbers("waveclip")["savings"]
    for method, key in (("WAVECLIP-high (ViT-B/16)", "high"), ("WAVECLIP at 11.7 GFLOPs (section 4.1)", "prose")):
        saving = _saving(costs[method], costs["CLIP ViT-B/16"])
        yield Comparison(f"{method}, saved as stated, against ours counted alike", printed[key], saving, "%")

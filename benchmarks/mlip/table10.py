"""MLIP's Table 10: the time of a training step of every row, and accuracy for the time, beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import read_recipe
from benchmarks.cells import Comparison, Result, missing_runs, number, table
from benchmarks.mlip import shapes
from benchmarks.mlip.models import GUIDE, needing, not_run
from benchmarks.mlip.paper_scale import COLUMNS, how, result_of, stored
from benchmarks.mlip.shapes_runs import BY_NAME, COMMAND, ROWS, SEEDS, SHAPES, TEXTURES
from benchmarks.printed import paper_numbers
from benchmarks.speed.training import train_step
from benchmarks.training.drift import built
from common.data.embedded.module import EmbeddedDataModule
from common.timing import alternate, ratio

ROUNDS, GPUS = 7, 32
REFERENCE = "clip"
"""GPUS: the paper's, over all of which its ratio takes the hours."""


def run(smoke: bool = False, dry: Path | None = None) -> dict[str, Any]:
    """Seconds of a step of every row, in alternating rounds, and the accuracies of the rows that were trained.

    smoke: two rounds, four pairs.  dry: the folder of a dry run whose results take the stored ones' place.
    Without the Guide's weights the result has the command that trains it.
    """
    rounds, pairs = (2, 4) if smoke else (ROUNDS, None)
    measure = partial(_measure, _measured_rows(), rounds, pairs, dry)
    return needing("mlip-table10", (GUIDE,), measure, dtype="bfloat16 autocast", rounds=rounds)


def _measure(names: list[str], rounds: int, pairs: int | None, dry: Path | None) -> dict[str, Any]:
    first = {name: BY_NAME[name].run(f"{name}-0", 0, {}) for name in names}  # rate and decay take no time
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = {name: built(run.recipe, run.settings)[0].to(device) for name, run in first.items()}
    batches = {recipe: _batch(recipe, pairs, device) for recipe in {run.recipe for run in first.values()}}
    steps = {name: train_step(module, batches[first[name].recipe], torch.bfloat16) for name, module in modules.items()}
    times, trained = alternate(steps, rounds), shapes.known(dry)
    rows = [
        {
            "run": name,
            "seconds": times[name]["seconds"],
            "of_reference": ratio(times[name], times[REFERENCE]),
            "steps": first[name].steps,
            "seeds": len(trained.get(name, ())),
            "accuracy": shapes.measured_row(BY_NAME[name], trained[name])["test"] if name in trained else None,
        }
        for name in names
    ]
    return {
        "batch": len(batches[SHAPES]["image"]),
        "rows": rows,
        "planned": len(SEEDS),
        "paper": paper_numbers("mlip")["table10"],
        "evaluated": _evaluated(stored(dry)),
    }


def _evaluated(known: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By method: accuracy in %, the hours of all GPUs added up, and the ratio; None: not run, or not recorded."""
    rows = {}
    for row in paper_numbers("mlip")["table10"]:
        result = result_of(known, row["model"], COLUMNS["top1"])
        accuracy = result and 100 * COLUMNS["top1"].read(result)
        hours = result and result["conditions"].get("device_hours")
        ratio = None if accuracy is None or not hours else accuracy / (hours / GPUS)
        rows[row["method"]] = {"accuracy": accuracy, "gpu_hours": hours, "ratio": ratio}
    return rows


def _batch(recipe: str, pairs: int | None, device: str) -> dict[str, Tensor | list[Tensor]]:
    """The first batch of ``val`` as a recipe's training reads it. pairs: only the first so many."""
    arguments = read_recipe(recipe)["data"]["init_args"]
    data = EmbeddedDataModule(**arguments | {"num_workers": 0})
    batch = next(iter(data.dataloader("val", train=True)))
    part = {
        name: batch[name][:pairs].to(device) for name in ("image", "text", "caption_id", "text_view") if name in batch
    }
    return part | {"image_views": [view[:pairs].to(device) for view in batch.get("image_views", ())]}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    if absent := not_run(result):
        return absent
    paper = []
    for row in result["paper"]:
        ours = result.get("evaluated", {}).get(row["method"], {})
        cells = [
            text
            for key, form in (("accuracy", ".1f"), ("gpu_hours", ".0f"), ("ratio", ".2f"))
            for text in (format(row[key], form), number(ours.get(key), form))
        ]
        paper.append([row["method"], *cells])
    rows = []
    (step,) = (row["seconds"] for row in result["rows"] if row["run"] == REFERENCE)
    for row in result["rows"]:
        # By the ratio within rounds: a median of seconds alone follows what else the machine did.
        seconds, found = step * row["of_reference"], row["accuracy"]
        minutes = seconds * row["steps"] / 60
        reached = [shapes.accuracy(found), f"{100 * found[0] / minutes:.1f}"] if found else ["not run", "not run"]
        measured = [f"{seconds:.3f}", f"{row['of_reference']:.2f}", f"{minutes:.2f}"]
        rows.append([row["run"], *measured, row["seeds"], *reached])
    rows += [[name, *["not run"] * 3, "–", "not run", "not run"] for name in _unmeasured(result)]
    setting = result["conditions"]
    incomplete = any(row["seeds"] < result["planned"] for row in result["rows"])
    note = (
        f"Steps (forward, backward, clipped AdamW) of {result['batch']} pairs, {setting['dtype']}: {REFERENCE}'s "
        f"median of {setting['rounds']} rounds in which all rows take turns in one process, and of each other row the "
        "median of its ratio to it in the same round, without an interval: a tenth more or less tells nothing. "
        f"{setting['device']}, {setting['threads']} threads, torch {setting['torch']}. Reading pictures is no part of "
        "a step. Accuracies are those of `make reproduce-mlip-shapes`. The paper prints MLIP's row shifted by a "
        "column, and its text calls 370 GPU hours fewer than 361."
    )
    if incomplete:
        note += f" Not all of {result['planned']} seeds were run: `{COMMAND}`."
    head = ["embedded row", "s a step", f"of {REFERENCE}'s", "minutes for its steps", "seeds", "zero-shot [95 %]"]
    printed = "zero-shot", "GPU hours", "zero-shot / hours of all GPUs"
    parts = [
        table(["ViT-B/16 on CC3M", *(f"{title}, {whose}" for title in printed for whose in ("paper", "ours"))], paper),
        how(paper_numbers("mlip")["table10"], [COLUMNS["top1"]])
        + f" GPU hours are those that the model directory records; the ratio's hours are theirs over {GPUS}.",
        table([*head, "of it a minute"], rows),
        note,
    ]
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def compare(result: Result) -> Iterator[Comparison]:
    """The printed numbers; then MLIP's time and accuracy in CLIP's, which hold on another machine too."""
    printed = {row["method"]: row for row in result["paper"]}
    ours = {row["run"]: row for row in result["rows"]}
    reached = {run: row["accuracy"] and row["accuracy"][0] for run, row in ours.items()}
    for method, row in printed.items():
        alike, embedded = result.get("evaluated", {}).get(method, {}), reached.get(row.get("run"))
        if alike.get("accuracy") is not None:
            yield Comparison(f"{method}, zero-shot", row["accuracy"], alike["accuracy"], "%")
        else:
            value = embedded and 100 * embedded
            yield Comparison(f"{method}, zero-shot", row["accuracy"], value, "%", "run" not in row)
        yield Comparison(f"{method}, training", row["gpu_hours"], alike.get("gpu_hours"), "GPU hours")
        what = f"{method}, zero-shot for the hours of all GPUs"
        yield Comparison(what, row["ratio"], alike.get("ratio"), "% an hour")
    clip, mlip, slower = printed["CLIP"], printed["MLIP"], ours["mlip"]["of_reference"]
    what = "MLIP's training, in CLIP's time (ours: a step's)"
    yield Comparison(what, mlip["gpu_hours"] / clip["gpu_hours"], slower, "times", False)
    worth = reached["mlip"] / reached["clip"] / slower if reached["mlip"] and reached["clip"] else None
    yield Comparison("MLIP's zero-shot for its time, in CLIP's", mlip["ratio"] / clip["ratio"], worth, "times", False)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings of rows that were not run."""
    rows = [(row["run"], row["seeds"], result["planned"]) for row in result["rows"]]
    rows += [(name, 0, result["planned"]) for name in _unmeasured(result)]
    yield from missing_runs(rows, COMMAND)


def _measured_rows() -> list[str]:
    """The rows of a whole run: those on scenes of shape, but for those that differ in their data alone."""
    return [row.name for row in ROWS if row.recipe != TEXTURES and "data" not in row.settings]


def _unmeasured(result: Result) -> list[str]:
    """The rows that came after a result was made."""
    measured = {row["run"] for row in result["rows"]}
    return [name for name in _measured_rows() if name not in measured]

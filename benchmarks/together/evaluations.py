"""Many results of `effclip evaluate` as tables of models x data sets: `python -m benchmarks evaluations DIR ...`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.cells import accuracy, table
from common.evaluate.command import EVALUATIONS
from common.evaluate.prompts import ENSEMBLE

TITLES = {
    "zeroshot": "Zero-shot accuracy, %",
    "retrieval": "Retrieval, recall in %",
    "linear-probe": "Linear probe, accuracy in %",
}


class Cell(NamedTuple):
    """One number (in %) of a table, with its row, its column and its text.

    chance: what guessing gives there, in %; None: unknown.
    """

    row: str
    column: str
    value: float
    text: str
    chance: float | None


def collect(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results in all JSON files below the folders. ValueError: no such folder, or no result in any of them."""
    results = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder.absolute()}; give one that `effclip evaluate --out` wrote to")
        for file in sorted(folder.rglob("*.json")):
            result = json.loads(file.read_text())
            if isinstance(result, dict) and result.get("task") in EVALUATIONS:
                results.append(result | {"file": str(file)})
    if not results:
        raise ValueError(f"no result of `effclip evaluate` below {', '.join(map(str, folders))}")
    return results


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A table and a note for each task. ValueError: two results for one cell."""
    blocks = []
    for task in EVALUATIONS:
        chosen = [result for result in results if result["task"] == task]
        if chosen:
            blocks += [f"**{TITLES[task]}**", _table(chosen), _note(chosen)]
    return "\n\n".join(blocks) + "\n"


def _table(results: Sequence[dict[str, Any]]) -> str:
    cells: dict[tuple[str, str], tuple[Cell, str]] = {}
    for result in results:
        for cell in _cells(result, _name(result, results)):
            other = cells.setdefault((cell.row, cell.column), (cell, result["file"]))[1]
            if other != result["file"]:
                raise ValueError(f"{other} and {result['file']} both give {cell.row} on {cell.column}; keep one")
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    # Recalls at several ranks, and splits of one set, which differ in their names, are no like quantities.
    average = 1 < len(columns) == len({result["data"] for result in results})
    chances = {column: cell.chance for (_, column), (cell, _) in cells.items()}
    lines = [["chance", *("–" if chances[column] is None else f"{chances[column]:.2g}" for column in columns)]]
    lines[0] += ["–"] * average
    for row in rows:
        line = [cells[row, column][0] if (row, column) in cells else None for column in columns]
        texts = ["not run" if cell is None else cell.text for cell in line]
        if average:
            # An average over fewer sets would not be comparable with those of the other rows.
            texts.append("–" if None in line else f"{fmean(cell.value for cell in line):.1f}")
        lines.append([row, *texts])
    return table(["model", *columns, *["average"] * average], lines)


def _cells(result: dict[str, Any], row: str) -> Iterator[Cell]:
    """The numbers of one result."""
    where, metrics = f"{result['data']} {result['split']}", result["metrics"]
    if result["task"] == "retrieval":
        pictures, texts = metrics["samples"], metrics["texts"]
        sides = ("I→T", "image_to_text", texts, texts / pictures), ("T→I", "text_to_image", pictures, 1)
        for arrow, side, candidates, own in sides:
            recalls, interval = metrics[side], metrics[side]["interval"]
            for name in filter("interval".__ne__, recalls):
                value, rank = recalls[name], int(name.removeprefix("R@"))
                text = accuracy(value, interval) if rank == 1 else f"{100 * value:.1f}"
                column = f"{where} {arrow} {name}"
                yield Cell(row, column, 100 * value, text, 100 * recall_by_chance(rank, candidates, own))
        return
    if result["metric"] == "mean_per_class":
        where += " (mean per class)"
    shots = metrics["shots"] if result["task"] == "linear-probe" else {"": metrics}
    for shot, measured in shots.items():
        fraction = measured["top1" if result["metric"] == "accuracy" else result["metric"]]
        value = 100 * fraction
        text = f"{value:.1f}"
        if "deviation" in measured:
            text += f" ± {100 * measured['deviation']:.1f}"
        elif result["metric"] == "accuracy":
            text = accuracy(fraction, measured["interval"])
        chance = 100 / result["conditions"]["classes"] if "classes" in result["conditions"] else None
        yield Cell(f"{row}, {shot} shots" if shot.isdigit() else row, where, value, text, chance)


def recall_by_chance(rank: int, candidates: int, own: float) -> float:
    """How often one of ``own`` right candidates is among the first ``rank`` of a random order.

    own: a mean where queries differ in it.
    """
    misses = ((candidates - own - place) / (candidates - place) for place in range(min(rank, candidates)))
    return 1 - prod(max(miss, 0.0) for miss in misses)


def _name(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The model, with the hash of its weights where several share the name, and settings other than the default."""
    run = result["conditions"]
    name = result["model"]
    weights = [other["conditions"]["weights"] for other in results if other["model"] == name]
    sides = [side for side in ("image", "text") if len({known[side] for known in weights if side in known}) > 1]
    if sides:
        name += f" ({', '.join(run['weights'][side][:6] for side in sides if side in run['weights'])})"
    if run.get("features", "embedding") != "embedding":
        name += f", {run['features']} features"
    if run.get("template", ENSEMBLE) != ENSEMBLE:
        name += f", template {run['template']}"
    if run["dtype"] != "float32":
        name += f", {run['dtype']}"
    if run["limit"]:
        name += f", {run['limit']:,} pictures"
    return name


def _note(results: Sequence[dict[str, Any]]) -> str:
    """Scale, images, intervals, revision and device."""
    runs = [result["conditions"] for result in results]
    pictures = {f"{result['data']} {result['split']} {result['conditions']['samples']:,}" for result in results}
    scales, revisions, devices = (sorted({str(run[key]) for run in runs}) for key in ("scale", "revision", "device"))
    return (
        f"Scale: {', '.join(scales)}. Pictures: {', '.join(sorted(pictures))}. Brackets: Wilson's 95 % interval; "
        "±: the deviation between draws of the shots. "
        f"Revision {', '.join(revision[:10] for revision in revisions)}; {', '.join(devices)}."
    )


def main(arguments: Sequence[str] = ()) -> int:
    """Print the tables, or write them to a file."""
    command = argparse.ArgumentParser(prog="python -m benchmarks evaluations", description=__doc__)
    command.add_argument("folders", nargs="+", help="folders with result files of `effclip evaluate`")
    command.add_argument("--out", type=Path, help="write the Markdown here instead of printing it")
    args = command.parse_args(arguments)
    text = markdown(collect(args.folders))
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)
        print(f"wrote {args.out}")
    return 0

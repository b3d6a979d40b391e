"""A dry run of MLIP's ten tables: `python -m benchmarks mlip-dry-run`, the second half of `make smoke`.

Miniatures of MLIP, SLIP, DeCLIP and FILIP are trained for four steps on noise, converted to model directories, and
measured once each. Their numbers are filed as the results of every model, data set and training that the tables read.
So every cell is filled, by the way that real results take, and none of the numbers means anything; the page says so.
It goes to $EFFCLIP_RUNS/dry-run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.mlip import shapes_runs
from benchmarks.mlip.paper_scale import COLUMNS
from benchmarks.mlip.tables_1_2_4 import TABLES
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from common.data.catalogue import entry
from common.paths import runs_directory

if TYPE_CHECKING:
    from common.models import Model

COMMAND = "python -m benchmarks mlip-dry-run"
NUMBERS = range(1, 11)
NOTICE = (
    "Dry run. Every number of ours on this page, costs apart, is that of a miniature, trained for four steps on "
    "noise: it shows that each cell can be filled, and means nothing."
)
RECIPES = {kind: f"mlip/{kind}.yaml" for kind in ("slip", "declip", "filip")} | {"mlip": "mlip/yfcc15m.yaml"}
"""What the miniature of each kind is trained by."""
_OVERLAY = "mlip/smoke.yaml"
_UNFILLED = ("–", "not run", "")


def main(arguments: Sequence[str] = ()) -> int:
    """Fill every cell of MLIP's tables with the numbers of miniatures, and make the page of them.

    ValueError: a cell that stayed empty.
    """
    from benchmarks.report.page.build import page, paper, stored  # of all papers, and no table of one needs it

    argparse.ArgumentParser(prog=COMMAND, description=main.__doc__).parse_args(arguments)
    folder = runs_directory() / "dry-run"
    shutil.rmtree(folder, ignore_errors=True)
    file_results(folder, {kind: miniature(folder, kind) for kind in RECIPES})
    tables = folder / "tables"
    tables.mkdir()
    for number in NUMBERS:
        entry = benchmark(f"mlip-table{number}")
        result = entry.load().run(smoke=True, dry=folder)
        written = entry.load().render(result)["md"]
        if empty := unfilled(number, written):
            raise ValueError(f"{entry.item} has no number in {', '.join(' / '.join(place) for place in empty)}")
        (tables / f"{entry.name}.json").write_text(json.dumps(result, ensure_ascii=False) + "\n")
        (tables / f"{entry.name}.md").write_text(written)
    file = folder / "report.html"
    inside = f"<p><strong>{NOTICE}</strong></p>\n{paper('MLIP', stored(tables))}"
    file.write_text(page({"glance": ("MLIP: a dry run", inside)}))
    print(f"{file}: every cell of {len(NUMBERS)} tables is filled. {NOTICE}")
    return 0


def wanted() -> Iterator[tuple[str | None, str, str]]:
    """(model, data, task) of every evaluation that a table reads; no model where the method is not of this suite."""
    printed = paper_numbers("mlip")
    for block in (block for blocks in TABLES.values() for block in blocks):
        for row in printed[block.printed]:
            for column, value in zip(block.columns, row["values"], strict=False):  # means follow
                if value is not None:
                    yield row.get("model"), column.data, column.task
    for number in (3, 5, 6, 7, 8, 9, 10):
        for row in printed[f"table{number}"]:
            keys = [key for key in COLUMNS if key in row] or ["top1"] * ("accuracy" in row)
            for column in (COLUMNS[key] for key in keys):
                yield row[column.model], column.data, column.task


def kind_of(model: str) -> str:
    """The kind of miniature that stands for a model; MLIP's for those of MLIP's parts and for CLIP."""
    return next((kind for kind in RECIPES if model.startswith(f"{kind}-")), "mlip")


def file_results(folder: Path, measured: Mapping[str, dict[str, Any]]) -> None:
    """Write what ``measured`` says as the result of every evaluation and of every embedded training.

    measured: by kind, what ``miniature`` gives.
    """
    (folder / "evaluations").mkdir(parents=True)
    for model, data, task in {each for each in wanted() if each[0]}:
        own = measured[kind_of(model)]
        stated = {"limit": None, "features": "penultimate", "device_hours": own["device_hours"]}
        named = {"model": model, "data": data, "task": task, "split": "test", "metric": entry(data).metric}
        result = named | {"metrics": own[task], "conditions": stated}
        (folder / "evaluations" / f"{model}-{data}-{task}.json").write_text(json.dumps(result))
    (folder / "trained").mkdir()
    right = np.arange(100) < 100 * measured["mlip"]["zeroshot"]["top1"]
    for row, seed in product(shapes_runs.BY_NAME, shapes_runs.SEEDS):
        stated = {"seed": seed, "precision": "32-true"}
        result = {"conditions": stated, "gmacs": measured["mlip"]["gmacs"], "minutes": 1.0, "terms": {}}
        (folder / "trained" / f"{row}-{seed}.json").write_text(json.dumps(result))
        np.savez_compressed(folder / "trained" / f"{row}-{seed}.npz", **dict.fromkeys(shapes_runs.ANSWERS, right))


def miniature(folder: Path, kind: str) -> dict[str, Any]:
    """Train the miniature of a kind in ``folder``, convert it, and measure it on its noise.

    Returns {"zeroshot", "linear-probe", "retrieval": those that tables read of this kind, as ``effclip evaluate`` has
    them, "device_hours", "gmacs"}. ValueError: no training.
    """
    import torch

    from benchmarks.training.run import last_checkpoint
    from common.cli import main as lightning
    from common.deploy.convert import main as convert
    from common.flops import count_macs
    from common.models import load_model
    from common.stages import EncodeImage

    start, recipe = time.monotonic(), RECIPES[kind]
    if lightning(["fit", "-c", recipe, "-c", _OVERLAY, "--trainer.default_root_dir", str(folder / kind / "fit")]):
        raise ValueError(f"the miniature's training failed; `lightning fit -c {recipe} -c {_OVERLAY}` is the same")
    hours = (time.monotonic() - start) / 3600
    convert([str(last_checkpoint(folder / kind / "fit")), str(folder / kind / "model")])
    model = load_model(str(folder / kind / "model"))
    tasks = {task for name, _, task in wanted() if name and kind_of(name) == kind}
    measured: dict[str, Any] = {task: _measured(model, task) for task in sorted(tasks)}
    if kind == "mlip":
        picture = torch.zeros(1, 3, model.image_size, model.image_size)
        measured["gmacs"] = count_macs(EncodeImage(model.images.image_tower), picture).gmacs
    return measured | {"device_hours": hours}


def _measured(model: Model, task: str) -> dict[str, Any]:
    """The result of a task on noise."""
    from common.data.lookup import Captioned, Labelled
    from common.data.smoke import CLASSES, SAMPLES, SHARDS, SmokeDataModule
    from common.evaluate.tasks import Settings, linear_probe, retrieval, zero_shot

    data, settings = SmokeDataModule("mlip/smoke.json"), Settings()

    def loader(*_: Any) -> Any:
        return data.dataloader("test", train=False)

    if task == "retrieval":
        captions = [[f"picture number {number}"] for number in range(SHARDS * SAMPLES)]
        return retrieval(model, Captioned("test", captions, loader), settings)
    shown = Labelled("test", [str(label) for label in range(CLASSES)], ("picture number {}",), "accuracy", loader)
    if task == "zeroshot":
        return zero_shot(model, shown, shown.templates, settings)
    return linear_probe(model, shown, {"train": shown, "val": shown}, ["full"], 1, settings, "penultimate")


def unfilled(number: int, markdown: str) -> list[tuple[str, str]]:
    """(row, column) of the cells without a number, but for those that the paper leaves empty.

    In Table 9 a plain CLIP has no Guide and saves nothing.
    """
    empty = [(row, column) for row, column, value in cells(markdown) if value in _UNFILLED]
    known = {(row, column) for row, column in empty if row.endswith(", paper") or column.endswith(", paper")}
    known |= {(row, column) for row, column in empty if (row.replace(", ours", ", paper"), column) in known}
    if number == 9:
        known |= {place for place in empty if place[1] in ("Guide", "image side saves")}
    return [place for place in empty if place not in known]


def cells(markdown: str) -> Iterator[tuple[str, str, str]]:
    """(row, column, text) of all tables in a Markdown text."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
        for row in rows:
            yield from ((row[0], title, text) for title, text in zip(head, row, strict=True))

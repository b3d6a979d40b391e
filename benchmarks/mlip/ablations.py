"""Trains the rows of MLIP's ablations at embedded scale: `python -m benchmarks mlip-ablations [--table N] [--list]`.

Every row is ``mlip/embedded.yaml``, or a baseline's recipe like it, with some settings changed; start, steps, data and
seeds are the same for all. A row that
several tables show is trained once. Finished runs are skipped; interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import WEIGHTS, read_recipe
from benchmarks.printed import paper_numbers
from benchmarks.training import retrain
from benchmarks.training.run import RECIPES, STORED, Run, work
from common.data.lookup import source
from common.evaluate.tasks import Settings, retrieval, zero_shot
from common.flops import count_macs
from common.models import load_model
from common.paths import runs_directory
from common.stages import EncodeImage

RESULTS = STORED / "mlip"
DATA, RECIPE, SEEDS = "embedded-1", "mlip/embedded.yaml", (0, 1, 2)
PICTURES, HELD_OUT = 8000, 2000
"""A row is scored on the first so many pictures of seen names, and of held-out ones."""
COMMAND = "python -m benchmarks mlip-ablations"
TABLES = ("3", "5", "6", "7", "8")

_DENSE = {"keep_rates": None, "guide": None}
_CLIP = {
    **_DENSE,
    "frequency_layers": 0,
    "frequency_weight": 0.0,
    "frequency_token_weight": 0.0,
    "spatial_token_weight": 0.0,
}
_INSTANCES = {"frequency_token_weight": 0.0, "spatial_token_weight": 0.0}
_ALIGNED = {"spatial_token_weight": 0.1, "spatial_matching": "one_to_many"}
_LATE = {"spatial_weight": 0.5, "spatial_token_weight": 0.5, "spatial_matching": "filip"}
ROWS: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, "spatial_weight": 1.0},
    "late-interaction": {**_CLIP, **_LATE},
    "frequency": {**_DENSE, **_INSTANCES},
    "frequency-linear": {**_DENSE, **_INSTANCES, "spectrum": "linear"},
    "tokens": {**_CLIP, **_ALIGNED},
    "frequency-tokens": _DENSE,
    "mlip": {},
    "no-guide": {"guide": None},
    "one-many": {"frequency_matching": "one_to_one", "spatial_matching": "one_to_many"},
    "one-one": {"frequency_matching": "one_to_one"},
    "many-many": {"spatial_matching": "one_to_many"},
    "smoothing": {"label_smoothing": 0.1},
    "growing-smoothing": {"label_smoothing": 0.1, "smoothing_grows": True},
    "neighbours": {"neighbour_weight": 0.325, "neighbour_queue": 2048},
    "masking": {"masking_weight": 0.2},
    "filip": {},
    "slip": {},
    "declip": {},
    "declip-no-neighbours": {"neighbour_weight": 0.0},
    "clip-5": {**_CLIP, "spatial_weight": 1.0, "train_fraction": 0.05},
    "mlip-20": {"train_fraction": 0.2},
    "mlip-5": {"train_fraction": 0.05},
}
"""Each row's changes of its recipe: arguments of the model, and the data's ``train_fraction``.

late-interaction gives half of the loss to the embedding that is evaluated and half to FILIP's loss. The paper
states no smoothing, and no weight or queue of the neighbours; those are our choice (the weight is half of InfoNCE's, as
in DeCLIP, and the queue has 16 batches). growing-smoothing and masking are
LightCLIP's additions. A row's steps show 25,600 of all 60,000 pictures, so a fraction matters only where it
makes pictures come again.
"""
_DECLIP = "mlip/declip_embedded.yaml"
RECIPES_OF_BASELINES = {
    "filip": "mlip/filip_embedded.yaml",
    "slip": "mlip/slip_embedded.yaml",
    "declip": _DECLIP,
    "declip-no-neighbours": _DECLIP,
}
"""The recipes of rows that are no setting of MLIP's."""
BASELINE, MODEL = WEIGHTS / "mlip_baseline.safetensors", WEIGHTS / "embedded_mlip.safetensors"
_COMMITTED = {"clip-seed0": BASELINE, "mlip-seed0": MODEL}
"""The runs whose weights the figures use."""


def runs(names: Iterable[str]) -> list[Run]:
    """The rows' trainings, seed by seed, so that a series that stops early leaves whole tables of fewer seeds."""
    return [_run(name, seed) for seed, name in product(SEEDS, names)]


def _run(name: str, seed: int) -> Run:
    run = f"{name}-seed{seed}"
    settings, output = _settings(name), _COMMITTED.get(run)
    recipe = RECIPES_OF_BASELINES.get(name, RECIPE)
    minutes = RECIPES[recipe]  # fewer would shorten the recipe
    return Run(f"mlip/{run}", recipe, minutes, seed, settings, output, target=f"{COMMAND} --only {run}")


def _settings(name: str) -> dict[str, dict[str, Any]]:
    """A row's changes of the recipe, those of the model apart from those of the data."""
    model, data = dict(ROWS[name]), {}
    if "train_fraction" in model:
        data["train_fraction"] = model.pop("train_fraction")
    return {"model": model, "data": data}


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished, and write the result of each run. A smoke run only lists."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--table", choices=TABLES, help="the rows of this table alone")
    parser.add_argument("--only", metavar="RUN", help="this run alone, such as mlip-seed0")
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores")
    args = parser.parse_args(arguments)
    chosen = [run for run in runs(rows_of(args.table)) if args.only in (None, run.name.removeprefix("mlip/"))]
    if not chosen:
        raise ValueError(f"--only {args.only} is no run here; they are a row of {', '.join(ROWS)}, and -seed0, 1 or 2")
    work(chosen, evaluate, args.list or bool(os.environ.get("SMOKE")))
    return 0


def rows_of(table: str | None) -> list[str]:
    """The names of a table's rows that we train; None: of all tables."""
    if table is None:
        return list(ROWS)
    return [row["run"] for row in paper_numbers("mlip")[f"table{table}"] if row.get("run")]


def evaluate(weights: Path, recipe: str) -> dict[str, Any]:
    """Accuracy on ``test`` by ``retrain.evaluate``, on held-out names, retrieval, and the image tower's GMACs.

    "unseen" scores pictures of held-out names among all names, "unseen-alone" among the held-out ones.
    """
    result = retrain.evaluate(weights, recipe, ("test",), PICTURES)
    model, settings = load_model(str(weights)), Settings()
    held_out = replace(settings, limit=HELD_OUT)
    for split in ("unseen", "unseen-alone"):
        data = source(DATA, "zeroshot", split)
        result[split] = zero_shot(model, data, data.templates, held_out) | {"names": len(data.class_names)}
    result["retrieval"] = retrieval(model, source(DATA, "retrieval"), settings)
    picture = torch.zeros(1, 3, model.image_size, model.image_size)
    images = getattr(model.images, "image_tower", model.images)  # a FILIP counts its head too
    return result | {"gmacs": count_macs(EncodeImage(images), picture).gmacs}


def results(dry: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """The stored results of every row, in the order of the seeds; a row that was not run has none.

    dry: the folder of a dry run (``benchmarks.mlip.dry_run``) whose results take their place.
    ValueError: runs of different lengths, since no table may compare them.
    """
    folder = dry / "trained" if dry else RESULTS
    by_row = {
        name: [json.loads(path.read_text()) for seed in SEEDS if (path := folder / f"{name}-seed{seed}.json").is_file()]
        for name in ROWS
    }
    lengths: dict[int, list[str]] = {}
    for run in (run for results in by_row.values() for run in results):
        lengths.setdefault(run["steps"], []).append(run["name"])
    if len(lengths) > 1:
        listing = "; ".join(f"{steps} steps: {', '.join(names)}" for steps, names in sorted(lengths.items()))
        raise ValueError(
            f"runs of different lengths cannot be compared ({listing}); remove the folders of one kind from "
            f"{runs_directory() / 'retrain' / 'mlip'}, and `{COMMAND}` trains them as {RECIPE} now says"
        )
    return by_row


def reasons(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why runs are to be made again: how the version of the code that trained them differs."""
    return sorted({result["superseded"] for result in results if "superseded" in result})


def superseded(rows: Mapping[str, Iterable[str]]) -> list[str]:
    """A note for each reason to make rows again.  rows: by name, their ``reasons``."""
    by_reason: dict[str, list[str]] = {}
    for name, found in rows.items():
        for reason in found:
            by_reason.setdefault(reason, []).append(name)
    return [f"Being made again, since in these runs {why}: {', '.join(names)}." for why, names in by_reason.items()]


def batch_size() -> int:
    """The recipe's number of pairs in a training step."""
    return read_recipe(RECIPE)["data"]["init_args"]["batch_size"]

"""Trains the rows of MLIP's ablations at embedded scale: `python -m benchmarks mlip-ablations [--table N] [--list]`.

Every row is ``mlip/embedded.yaml`` with some settings changed, the same steps, data and seeds for all; a row that
several tables show is trained once. What is finished is skipped, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.mlip_table9 import EncodeImage, paper
from benchmarks.retrain import RESULTS as RETRAINED
from benchmarks.retrain import Run, work
from common.conditions import digest
from common.data.lookup import source
from common.flops import count_macs
from common.models import Model
from common.tasks import Settings, retrieval, zero_shot
from mlip.model import MLIP

RESULTS = RETRAINED / "mlip"
RECIPE, MINUTES, SEEDS = "mlip/embedded.yaml", 3, (0, 1, 2)
TABLES = ("3", "5", "6", "7", "8")

_DENSE = {"keep_rates": None, "guide": None}
_CLIP = {
    **_DENSE,
    "frequency_layers": 0,
    "frequency_weight": 0.0,
    "frequency_token_weight": 0.0,
    "spatial_token_weight": 0.0,
}
_ALIGNED = {"spatial_token_weight": 0.1, "spatial_matching": "one_to_many"}
_FILIP = {"spatial_weight": 0.5, "spatial_token_weight": 0.5, "spatial_matching": "filip"}
ROWS: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, "spatial_weight": 1.0},
    "filip": {**_CLIP, **_FILIP},
    "frequency": {**_DENSE, "frequency_token_weight": 0.0, "spatial_token_weight": 0.0},
    "tokens": {**_CLIP, **_ALIGNED},
    "frequency-tokens": _DENSE,
    "mlip": {},
    "no-guide": {"guide": None},
    "one-many": {"frequency_matching": "one_to_one", "spatial_matching": "one_to_many"},
    "one-one": {"frequency_matching": "one_to_one"},
    "many-many": {"spatial_matching": "one_to_many"},
    "smoothing": {"label_smoothing": 0.1},
    "neighbours": {"neighbour_weight": 0.2, "neighbour_queue": 2048},
    "clip-50": {**_CLIP, "spatial_weight": 1.0, "train_fraction": 0.5},
    "mlip-90": {"train_fraction": 0.9},
    "mlip-50": {"train_fraction": 0.5},
}
"""What each row changes of the recipe: settings of the model, and of the data its ``train_fraction``.

FILIP gives half of the weight to the embedding that is evaluated, half to late interaction of all pairs. Smoothing,
neighbours' weight and queue (16 batches, as DeCLIP's 64 Ki at 4,096 are) are our choice: the paper states none.
"""


def runs(names: Iterable[str]) -> list[Run]:
    """The rows' trainings, one for each seed, seed by seed, so that a stopped series has whole tables of fewer."""
    names = list(names)
    return [
        Run(f"mlip/{name}-seed{seed}", RECIPE, MINUTES, seed, settings=_typed(ROWS[name]))
        for seed in SEEDS
        for name in names
    ]


def _typed(settings: dict[str, Any]) -> tuple[str, ...]:
    """Settings as words of the command line."""
    typed: list[str] = []
    for name, value in settings.items():
        section = "data" if name == "train_fraction" else "model"
        typed += [f"--{section}.init_args.{name}", "null" if value is None else str(value)]
    return tuple(typed)


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished, and write a result for each run. A smoke run lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mlip-ablations", description=main.__doc__)
    parser.add_argument("--table", choices=TABLES, help="the rows of this table alone")
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores")
    said = parser.parse_args(arguments)
    work(runs(rows_of(said.table)), lambda weights, _: evaluate(weights), said.list or bool(os.environ.get("SMOKE")))
    return 0


def rows_of(table: str | None) -> list[str]:
    """The names of a table's rows that we train; without one, all."""
    if table is None:
        return list(ROWS)
    return [row["run"] for row in paper()[f"table{table}"] if row.get("run")]


def evaluate(weights: Path) -> dict[str, Any]:
    """Zero-shot accuracy on ``test`` and ``unseen``, recall on ``retrieval``, and the image tower's GMACs."""
    clip = MLIP.load(weights).eval()
    found = digest(weights)
    size = clip.image_tower.vit.image_size
    model = Model(weights.stem, "mlip", size, clip, clip, {"image": found, "text": found}, {weights.name: found})
    settings = Settings()
    measured: dict[str, Any] = {"gmacs": count_macs(EncodeImage(clip.image_tower), torch.zeros(1, 3, size, size)).gmacs}
    for split in ("test", "unseen", "unseen-alone"):
        of = source("embedded", "zeroshot", split)
        measured[split] = zero_shot(model, of, of.templates, settings) | {"names": len(of.class_names)}
    return measured | {"retrieval": retrieval(model, source("embedded", "retrieval"), settings)}


def results() -> dict[str, list[dict[str, Any]]]:
    """The stored results of every row, in the order of the seeds; a row that was not run has none."""
    return {
        name: [
            json.loads(path.read_text()) for seed in SEEDS if (path := RESULTS / f"{name}-seed{seed}.json").is_file()
        ]
        for name in ROWS
    }

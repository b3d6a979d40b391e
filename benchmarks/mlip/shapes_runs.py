"""Trains MLIP and its rivals from scratch on scenes of shape and of texture: `python -m benchmarks mlip-shapes-runs`.

The order is that of benchmarks/protocol.md: the Guide; trials that choose learning rate and weight decay on val, as
many with the clip row as with the mlip row; every row with three seeds. Finished runs are skipped, interrupted ones
continue.

Shapes: M pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import WEIGHTS, read_log, read_recipe
from benchmarks.cells import accuracy_of
from benchmarks.embedded import PART, right_answers
from benchmarks.training.drift import built
from benchmarks.training.run import RECIPES, STORED, Run, Settings, folder_of, work
from benchmarks.training.shapes import candidates, labelled
from common.data.embedded.module import EmbeddedDataModule
from common.flops import count_macs
from common.models import load_model
from common.retrieval import ranks
from common.stages import EncodeImage
from common.zeroshot import embed_prompts
from mlip.model import MLIP
from mlip.pretraining import MLIPPretraining

COMMAND = "python -m benchmarks mlip-shapes-runs"
SEEDS = range(3)
SPLITS, TEXTURE_SPLITS = ("test", "unseen", "retrieval"), ("test",)
ANSWERS = ("test", "unseen", "i2t", "t2i")
"""A row's kinds of answers: two splits, and on "retrieval" a picture's own caption and a caption's own picture."""
RATES, DECAYS, TRIAL_STEPS = (1e-3, 2e-3, 4e-3), (0.1, 0.5), 775
"""What the trials choose from, and their length, half of a row's."""
SHAPES, TEXTURES = "mlip/shapes.yaml", "mlip/textures.yaml"
IN_TRAINING = " in training"
CLIP, MLIP_ROW = "clip", "mlip"
"""The rows that the trials are run with."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    chosen_with: the row whose trials give its learning rate and weight decay: clip for CLIP's tower, mlip for MLIP's.
    settings: its changes of the recipe: arguments of the "model" and of the "data".
    length: training steps where they are not the recipe's.
    output: where the weights of seed 0 go if they are committed.
    """

    name: str
    title: str
    chosen_with: str
    settings: Settings = field(default_factory=dict)
    recipe: str = SHAPES
    length: int | None = None
    output: Path | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits on which it is measured."""
        return TEXTURE_SPLITS if self.recipe == TEXTURES else SPLITS

    def run(self, name: str, seed: int, chosen: Mapping[str, float], **others: Any) -> Run:
        """A training of this row. others: fields of the run."""
        settings = {**self.settings, "model": {**self.settings.get("model", {}), **chosen}}
        target = f"{COMMAND} --only {name}"
        fields = {"minutes": RECIPES[self.recipe], "settings": settings, "target": target, "length": self.length}
        return Run(f"mlip-shapes/{name}", self.recipe, seed=seed, **fields | others)


_DENSE = {"keep_rates": None, "guide": None}
_TOWER_OF_CLIP = {**_DENSE, "frequency_layers": 0, "frequency_weight": 0.0, "frequency_token_weight": 0.0}
_CLIP = {"model": {**_TOWER_OF_CLIP, "spatial_token_weight": 0.0, "spatial_weight": 1.0}}
_TOKENS = {"model": {**_TOWER_OF_CLIP, "spatial_token_weight": 0.1, "spatial_matching": "one_to_many"}}
_LATE = {"model": {**_TOWER_OF_CLIP, "spatial_weight": 0.5, "spatial_token_weight": 0.5, "spatial_matching": "filip"}}
_FREQUENCY = {"model": {**_DENSE, "frequency_token_weight": 0.0, "spatial_token_weight": 0.0}}
_LINEAR = {"model": {**_FREQUENCY["model"], "spectrum": "linear"}}
_SMOOTHING, _GROWING = {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "smoothing_grows": True}
_NEIGHBOURS = {"neighbour_weight": 0.325, "neighbour_queue": 2048}
_PART, PART_STEPS = {"data": {"train_fraction": 0.9}}, 1395
"""Nine tenths of the pictures, as often."""
_FILIP, _SLIP, _DECLIP = (f"mlip/{name}_shapes.yaml" for name in ("filip", "slip", "declip"))
ROWS = (
    Row("clip", "CLIP", CLIP, _CLIP, output=WEIGHTS / "shapes_mlip_baseline.safetensors"),
    Row("frequency", "CLIP + frequency transform", MLIP_ROW, _FREQUENCY),
    Row("frequency-linear", "CLIP + frequency transform of Y, not of its square", MLIP_ROW, _LINEAR),
    Row("tokens", "CLIP + token alignment", CLIP, _TOKENS),
    Row("late-interaction", "CLIP + late interaction", CLIP, _LATE),
    Row("frequency-tokens", "CLIP + both", MLIP_ROW, {"model": _DENSE}),
    Row("mlip", "MLIP (one to many, one to one)", MLIP_ROW, output=WEIGHTS / "shapes_mlip.safetensors"),
    Row("mlip-part", "MLIP, 90 % of the pictures", MLIP_ROW, _PART, length=PART_STEPS),
    Row("no-guide", "MLIP without Guide", MLIP_ROW, {"model": {"guide": None}}),
    Row(
        "one-many",
        "MLIP, one to one, one to many",
        MLIP_ROW,
        {"model": {"frequency_matching": "one_to_one", "spatial_matching": "one_to_many"}},
    ),
    Row("one-one", "MLIP, one to one, one to one", MLIP_ROW, {"model": {"frequency_matching": "one_to_one"}}),
    Row("many-many", "MLIP, one to many, one to many", MLIP_ROW, {"model": {"spatial_matching": "one_to_many"}}),
    Row("smoothing", "MLIP + label smoothing", MLIP_ROW, {"model": _SMOOTHING}),
    Row("neighbours", "MLIP + nearest neighbours", MLIP_ROW, {"model": _NEIGHBOURS}),
    Row("growing-smoothing", "MLIP + LightCLIP's growing smoothing", MLIP_ROW, {"model": _GROWING}),
    Row("masking", "MLIP + LightCLIP's masked language modelling", MLIP_ROW, {"model": {"masking_weight": 0.2}}),
    Row("filip", "FILIP", CLIP, recipe=_FILIP),
    Row("slip", "SLIP", CLIP, recipe=_SLIP),
    Row("declip", "DeCLIP", CLIP, recipe=_DECLIP),
    Row(
        "declip-no-neighbours",
        "DeCLIP without nearest neighbours",
        CLIP,
        {"model": {"neighbour_weight": 0.0}},
        recipe=_DECLIP,
    ),
    Row("texture-clip", "CLIP, scenes of texture", CLIP, _CLIP, TEXTURES, output=WEIGHTS / "textures_clip.safetensors"),
    Row("texture-frequency", "CLIP + frequency transform, scenes of texture", MLIP_ROW, _FREQUENCY, TEXTURES),
)
"""Every row. Pairs of matchings name that of the frequency tokens, then that of the spatial ones.

The paper states no smoothing, and no weight or queue of the neighbours; those are our choice: the weight is half of
InfoNCE's own, as in DeCLIP, and the queue has 16 batches. "late-interaction" gives half of the loss to InfoNCE and half
to FILIP's.
"""
BY_NAME = {row.name: row for row in ROWS}
GUIDE = Run(
    "mlip-shapes/guide",
    "mlip/guide_shapes.yaml",
    RECIPES["mlip/guide_shapes.yaml"],
    output=WEIGHTS / "shapes_guide.safetensors",
    target=f"{COMMAND} --only guide",
)


def trials(row: str) -> list[tuple[dict[str, float], Run]]:
    """What the trials of a row choose from, each with its run."""
    result = []
    for rate, decay in product(RATES, DECAYS):
        chosen = {"learning_rate": rate, "weight_decay": decay}
        name, minutes = f"trial-{row}-{rate:g}-{decay:g}", -(-RECIPES[SHAPES] // 2)
        result.append((chosen, BY_NAME[row].run(name, 0, chosen, minutes=minutes, length=TRIAL_STEPS)))
    return result


def tried(row: str) -> list[tuple[dict[str, float], float]]:
    """The finished trials of a row: what they tried, and the accuracy on val."""
    known = ((chosen, stored(run)) for chosen, run in trials(row))
    return [(chosen, result["val"]["top1"]["accuracy"]) for chosen, result in known if result]


def choice() -> dict[str, dict[str, float]] | None:
    """The settings with the best accuracy on val, by the row of the trials; None: trials are missing."""
    known = {row: tried(row) for row in (CLIP, MLIP_ROW)}
    if any(len(results) < len(RATES) * len(DECAYS) for results in known.values()):
        return None
    return {row: max(results, key=lambda result: result[1])[0] for row, results in known.items()}


def rows(chosen: Mapping[str, Mapping[str, float]]) -> list[Run]:
    """The trainings of all rows, seed by seed, so that a series that stops early leaves whole tables of fewer seeds."""
    return [
        row.run(f"{row.name}-{seed}", seed, chosen[row.chosen_with], output=None if seed else row.output)
        for seed, row in product(SEEDS, ROWS)
    ]


def stored(run: Run) -> dict[str, Any] | None:
    """The result of a finished run; None: it is not finished."""
    path = STORED / f"{run.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def answers_file(row: str, seed: int) -> Path:
    """Where a row's answers lie, beside its result: bool [M] by kind, see ANSWERS."""
    return STORED / "mlip-shapes" / f"{row}-{seed}.npz"


def batch_size() -> int:
    """The number of pairs in a training step."""
    return read_recipe(SHAPES)["data"]["init_args"]["batch_size"]


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished, and write the result of each run. A smoke run only lists."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="these runs alone: mlip-0, 'trial-*', 'clip-?'")
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores")
    args = parser.parse_args(arguments)
    listing = args.list or bool(os.environ.get("SMOKE"))
    first = [GUIDE, *(run for row in (CLIP, MLIP_ROW) for _, run in trials(row))]
    anything = _work(first, args.only, listing)
    chosen = choice()
    # Their names are known before their settings are.
    later = rows(chosen or {row: {} for row in (CLIP, MLIP_ROW)})
    if chosen:
        for row, settings in chosen.items():
            print(f"chosen on val with {row}: {', '.join(f'{name} {value:g}' for name, value in settings.items())}")
        anything |= _work(later, args.only, listing)
    elif waiting := list(_fitting(later, args.only)):
        anything = True
        for run in waiting if listing else ():
            print(f"{run.name:<34} about {run.minutes} min, waits for the trials")
        minutes = sum(run.minutes for run in waiting)
        print(f"{len(waiting)} runs of rows, about {minutes} min, wait for the trials: {COMMAND} --only 'trial-*'")
    if not anything:
        names = ", ".join(row.name for row in ROWS)
        raise ValueError(f"--only {args.only} is no run here; there are guide, trial-*, and -0, -1 or -2 of {names}")
    return 0


def _fitting(runs: Iterable[Run], only: str) -> Iterator[Run]:
    return (run for run in runs if fnmatchcase(run.name.removeprefix("mlip-shapes/"), only))


def _work(runs: Sequence[Run], only: str, listing: bool) -> bool:
    """Train the runs whose names fit; whether there are any."""
    fitting = list(_fitting(runs, only))
    for run in fitting:
        row, _, seed = run.name.removeprefix("mlip-shapes/").rpartition("-")
        if row in BY_NAME:
            how = partial(measure, run=run, splits=BY_NAME[row].splits, output=answers_file(row, int(seed)))
        else:
            how = partial(evaluate, splits=("val",))
        work([run], how, listing, committed=True)
    return bool(fitting)


def measure(
    weights: Path, recipe: str, run: Run, splits: Sequence[str], output: Path, batches: int | None = None
) -> dict[str, Any]:
    """``evaluate``, and what says whether each term of the loss trains at all.

    A term whose queue or head is not kept is known from the training alone.
    """
    on_val, logged = terms(weights, run, batches or 8), logged_terms(folder_of(run))
    unknown = {name: value for name, value in logged.items() if name.removesuffix(IN_TRAINING) not in on_val}
    return evaluate(weights, recipe, splits, output, batches) | {"terms": on_val | unknown}


@torch.no_grad()
def evaluate(
    weights: Path, recipe: str, splits: Sequence[str], output: Path | None = None, batches: int | None = None
) -> dict[str, Any]:
    """Accuracy on each split, and the image tower's GMACs; the answers go to ``output``. A look at test is logged.

    On "unseen" the held-out names are told apart. "retrieval" gives two sets of answers, "i2t" and "t2i", both by the
    embeddings; elsewhere FILIP compares tokens.
    batches: how many of 250 pictures of a split; None: all.
    """
    data = EmbeddedDataModule(**read_recipe(recipe)["data"]["init_args"] | {"batch_size": 250, "captions": False})
    loaded = load_model(str(weights))
    model, right = loaded.text_encoder(), {}
    for split in splits:
        if split == "test":
            read_log.record("mlip-shapes-runs", {2: "shapes", 3: "textures"}[data.revision], [weights])
        texts, first = candidates(split, data)
        loader = labelled(islice(data.dataloader(split, train=False), batches), first)
        if split == "retrieval":
            right["i2t"], right["t2i"] = retrieved(model, loader, texts)
        else:
            right[split] = right_answers(model, loader, texts)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(output, **{split: part.numpy() for split, part in right.items()})
    images = getattr(loaded.images, "image_tower", loaded.images)  # a FILIP counts its head too
    picture = torch.zeros(1, 3, loaded.image_size, loaded.image_size)
    accuracies = {
        about: {"top1": {**accuracy_of(part), "pictures": len(part), "first": int(part[:PART].sum())}}
        for about, part in right.items()
    }
    return {"names": len(data.class_names), **accuracies, "gmacs": count_macs(EncodeImage(images), picture).gmacs}


def retrieved(model: nn.Module, loader: Iterable[Mapping[str, Any]], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Whether each picture's own caption is the nearest to it, and each caption's own picture; both bool [M]."""
    images = torch.cat([model.encode_image(batch["image"]) for batch in loader])
    texts = embed_prompts(model, captions[: len(images)])
    of_images, of_texts = ranks(images, texts, torch.arange(len(images)))
    return of_images == 1, of_texts == 1


@torch.no_grad()
def terms(weights: Path, run: Run, batches: int = 8) -> dict[str, float]:
    """Means over batches of val: equation 2's losses by name, and in-batch top-1 of both image embeddings.

    "frequency top1" and "spatial top1" are the shares of pictures that are nearest to their own caption in the batch.
    Empty for SLIP, DeCLIP and FILIP, whose heads do not belong to the trained model; see ``logged_terms``.
    """
    model = run.settings["model"]
    left_out = dict.fromkeys(model.keys() & {"neighbour_weight", "masking_weight"}, 0.0)  # queue and head are not kept
    module, arguments = built(run.recipe, {"model": model | left_out})
    if type(module) is not MLIPPretraining:
        return {}
    module.clip, module.label_smoothing = MLIP.load(weights), 0.0  # smoothing raises InfoNCE, even above chance's
    module.eval()
    values: dict[str, list[float]] = {}
    data = EmbeddedDataModule(**arguments | {"num_workers": 0})
    for batch in islice(data.dataloader("val", train=False), batches):
        found = {**module.losses(batch), **_in_batch(module.clip, batch)}
        for name, value in found.items():
            values.setdefault(name, []).append(float(value))
    return {name: fmean(each) for name, each in values.items()}


def logged_terms(folder: Path) -> dict[str, float]:
    """Means of a training's losses over the last tenth of its steps, by name + IN_TRAINING, from its folder of logs."""
    rows = [
        row for file in sorted(folder.glob("*/metrics.csv")) for row in csv.DictReader(file.read_text().splitlines())
    ]
    values: dict[str, list[float]] = {}
    last = max((int(row["step"]) for row in rows), default=0)
    for row in rows:
        for column, value in row.items():
            term = re.fullmatch("train_(.+)_loss", column)
            if term and value and int(row["step"]) >= 0.9 * last:
                values.setdefault(term[1] + IN_TRAINING, []).append(float(value))
    return {name: fmean(each) for name, each in values.items()}


def _in_batch(clip: MLIP, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    features, text, own = clip.image_tower(batch["image"]), clip.encode_text(batch["text"]), batch["caption_id"]
    embeddings = {"frequency": features.frequency, "spatial": features.spatial}
    nearest = {name: (F.normalize(z, dim=-1) @ text.T).argmax(1) for name, z in embeddings.items() if z is not None}
    return {f"{name} top1": (own[place] == own).float().mean() for name, place in nearest.items()}

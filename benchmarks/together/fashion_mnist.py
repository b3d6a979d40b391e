"""Fashion-MNIST for real: a small CLIP trained on the catalogue's prompts, a WaveCLIP distilled from it, both tested.

    EFFCLIP_DATA=DIR make reproduce-fashion-mnist

A run that is finished in $EFFCLIP_RUNS/retrain is not trained again; an interrupted one continues. The weights of both
models are then written, evaluated on every test image, and committed with the numbers. A smoke run does the same in a
few steps on stand-in images, and leaves weights and results as they are.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import WEIGHTS, read_recipe
from benchmarks.cells import accuracy_of, table
from benchmarks.embedded import FASHION_MNIST_ATTRIBUTION, PART
from benchmarks.training.drift import first_losses
from benchmarks.training.export import card, from_checkpoint, save
from benchmarks.training.run import RECIPES, Run, fit, last_checkpoint
from benchmarks.waveclip.exits import headline, headline_lines
from benchmarks.waveclip.observed import Observed, costs, counts, observe
from benchmarks.waveclip.table2_embedded import COLUMNS, operating_points, row_cells
from common.clip import CLIP
from common.conditions import conditions, digest
from common.data import catalogue
from common.data.classification import ClassificationSet, classification_set
from common.data.classification_module import ClassificationDataModule
from common.data.pictures import loader
from common.paths import runs_directory
from waveclip import WaveTower

TARGET = "make reproduce-fashion-mnist"
_CLIP, _WAVE = "common/fashion_mnist_clip.yaml", "waveclip/fashion_mnist.yaml"
RUNS = (
    Run("fashion-mnist-clip", _CLIP, RECIPES[_CLIP], output=WEIGHTS / "fashion_mnist_clip.safetensors"),
    Run("fashion-mnist-waveclip", _WAVE, RECIPES[_WAVE], output=WEIGHTS / "fashion_mnist_waveclip.safetensors"),
)
"""The CLIP, and the WaveCLIP whose teacher it is."""

SHARES = {"quarter": 0.25, "half": 0.5}
"""Operating points between coarse-only and full, by the share of val's images that is refined."""

PASSED, NEAR = 0.85, 0.02
"""The goals: an accuracy that the CLIP passes, and a distance from it that WaveCLIP's full level keeps."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Train both models where that is not done, evaluate them, and return their rows and trainings.

    smoke: a few steps on stand-in images, evaluated on the first 500 of each split.
    ValueError: the data is not there (with what to get), or a training failed.
    """
    data = _data(smoke)
    run_conditions = conditions(
        "embedded",
        seeds=1,
        dtype="float32",
        data="stand-in pictures" if smoke else catalogue.entry(data.name).title,
        classes=data.class_names,
        template=data.templates[0],
        chosen_on=f"val, {len(data.val_pictures):,} pictures held out of train",
        reported_on="test, read once",
    )
    weights = [runs_directory() / "smoke" / run.output.name if smoke else run.output for run in RUNS]
    trainings = [_train(run, output, data, weights[0], smoke) for run, output in zip(RUNS, weights, strict=True)]
    result = {
        "name": "fashion-mnist",
        "conditions": run_conditions | {"weights": {path.name: digest(path) for path in weights}},
        "runs": trainings,
        **evaluate(*weights, data, PART if smoke else None),
    }
    if not smoke:
        _write_cards(result)
    return result


def _data(smoke: bool) -> ClassificationDataModule:
    """The data of the recipes, so that a missing file is reported before anything is trained."""
    if smoke:
        return recipe_data(_CLIP, stand_in())
    root = os.environ.get("EFFCLIP_DATA")
    if root and os.environ.get("DOWNLOAD"):
        classification_set("fashion_mnist", root, download=True)
    return recipe_data(_CLIP)


def recipe_data(recipe: str, root: Path | None = None) -> ClassificationDataModule:
    """A recipe's data module, which reads in the calling process. root: another folder than $EFFCLIP_DATA."""
    args = read_recipe(recipe)["data"]["init_args"]
    return ClassificationDataModule(**args | {"root": str(root) if root else None, "num_workers": 0})


def stand_in(folder: Path | None = None) -> Path:
    """A folder in Fashion-MNIST's format, with as many images: one pattern of noise for each class.

    It serves checks that must run without the data. folder: default ``smoke/fashion-mnist-data`` in $EFFCLIP_RUNS.
    """
    folder = folder or runs_directory() / "smoke" / "fashion-mnist-data"
    folder.mkdir(parents=True, exist_ok=True)
    patterns = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for prefix, pictures in (("train", 60_000), ("t10k", 10_000)):
        labels = (np.arange(pictures) % 10).astype(np.uint8)
        for kind, values in (("images", patterns[labels]), ("labels", labels)):
            head = struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape)
            file = folder / f"{prefix}-{kind}-idx{values.ndim}-ubyte.gz"
            file.write_bytes(gzip.compress(head + values.tobytes(), 1))
    return folder


def stand_in_losses(recipe: str, folder: Path | None = None) -> list[float]:
    """The losses of a recipe's first steps on the stand-in images, against which later code is checked for drift."""
    return first_losses(recipe, data=recipe_data(recipe, stand_in(folder)))


def _train(run: Run, output: Path, data: ClassificationDataModule, teacher: Path, smoke: bool) -> dict[str, Any]:
    """Train a run if it is not finished, write its weights, and return its part of the result.

    teacher: the weights that the second run starts from.
    """
    places = {"data": {"root": str(Path(data.root).expanduser().absolute())}}
    folder = runs_directory() / ("smoke" if smoke else "retrain") / run.name
    if smoke:
        shutil.rmtree(folder, ignore_errors=True)
        if output != teacher:
            places["model"] = {"weights": str(teacher.absolute())}
    result = fit(run, folder, "common/smoke.yaml" if smoke else None, places)
    save(from_checkpoint(last_checkpoint(folder), run.recipe), output)
    return result if smoke else result | {"first_losses": stand_in_losses(run.recipe)}


@torch.no_grad()
def evaluate(
    teacher: Path, student: Path, data: ClassificationDataModule, pictures: int | None = None
) -> dict[str, Any]:
    """Accuracies on val and test by the set's first prompt, then the rows, the headline and the counts.

    pictures: how many of the first images of each split; None: all.
    """
    clip, wave = CLIP.load(teacher).eval(), WaveTower.load(student).eval()

    def observed(images: ClassificationSet) -> Observed:
        part = images if pictures is None else images.subset(range(pictures))
        return observe(clip, wave, loader(part, data.preprocess, 250), data.class_prompts)

    val, test = observed(data.val_pictures), observed(data.test_pictures)
    dense, exits = costs(clip, wave)
    return {
        "levels": {"val": _levels(val), "test": _levels(test)},
        "rows": operating_points(val, test, dense, exits, SHARES),
        "headline": headline(val, test, exits, dense.macs.gmacs),
        "counts": counts(test),
    }


def _levels(answers: Observed) -> dict[str, dict[str, Any]]:
    """Accuracy, interval and number of images of the teacher and of both levels."""
    models = {name: getattr(answers, name) for name in ("teacher", "coarse", "fine")}
    return {name: {**accuracy_of(correct), "pictures": len(correct)} for name, correct in models.items()}


def _write_cards(result: dict[str, Any]) -> None:
    """A card beside each of the committed weights."""
    names = len(result["conditions"]["classes"])
    for run, training, levels in zip(RUNS, result["runs"], (("teacher",), ("coarse", "fine")), strict=True):
        measured = {split: {level: part[level] for level in levels} for split, part in result["levels"].items()}
        text = card(run.output, training | measured | {"names": names}, FASHION_MNIST_ATTRIBUTION, TARGET)
        run.output.with_suffix(".md").write_text(text)


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    rows = result["rows"]
    head = [f"{result['conditions']['data']}, 32 px", *COLUMNS]
    accuracies = table(head, [row_cells(row, rows[0]["gmacs"]) for row in rows])
    trainings = table(
        ["run", "steps", "minutes", "command"],
        [[run["name"], f"{run['steps']:,}", f"{run['minutes']:.0f}", f"`{run['command']}`"] for run in result["runs"]],
        left=(0, 3),
    )
    parts = [accuracies, *_goals(rows), *headline_lines(result["headline"]), trainings, _note(result)]
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def _goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The goals of the two models, and whether the lower ends of the intervals reach them."""
    outcome = {True: "reached", False: "NOT reached"}
    passed, near = rows[0]["interval"][0] >= PASSED, rows[-1]["against_teacher"][1] >= -NEAR
    return [
        f"The CLIP above {100 * PASSED:.0f} %: {outcome[passed]}. WaveCLIP's full level within {100 * NEAR:.0f} points "
        f"of it: {outcome[near]}. Both by the lower end of the interval."
    ]


def _note(result: dict[str, Any]) -> str:
    run = result["conditions"]
    val, test = (result["levels"][split]["teacher"]["pictures"] for split in ("val", "test"))
    return (
        f"Zero-shot among {len(run['classes'])} names by “{run['template']}”, on {test:,} test pictures; "
        f"thresholds chosen on {val:,} pictures held out of train. GMACs count attention on both sides, the image "
        f"tower's alone. One training seed. {run['dtype']} on {run['device']}, {run['threads']} threads, "
        f"torch {run['torch']}."
    )

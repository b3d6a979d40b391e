"""A small CLIP and a WaveCLIP for any pictures of classes, beside fair controls: trained here, then tested.

    make reproduce-photos PHOTOS=DIR

DIR has one folder a class, or folders train, val and test of such folders. SEEDS=n trains n times; a headline needs
three. Results and weights go to $EFFCLIP_RUNS/photos/NAME, or to OUT. A run that is finished there is not trained
again; an interrupted one continues in $EFFCLIP_RUNS. ONLY=PATTERN trains these runs alone and evaluates nothing. A
smoke run does the same in a few steps on drawn pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks import read_log, read_recipe
from benchmarks.cells import accuracy_of
from benchmarks.embedded import PART
from benchmarks.statistics import RESAMPLES
from benchmarks.together import frontier, reference_ladder
from benchmarks.together.compositions import FEW, compose, controls_of, families
from benchmarks.together.photo_models import CLIP as TEACHER
from benchmarks.together.photo_models import (
    HALF,
    TRAINED_ON,
    WAVE,
    PhotoSet,
    Weights,
    spelling,
    train,
    write_cards,
    written_once,
)
from benchmarks.together.photo_tables import render
from benchmarks.waveclip import answers, controls
from benchmarks.waveclip.costs import cost, exit_costs
from common.clip import CLIP
from common.conditions import conditions, digest
from common.data.classification import ClassificationSet, own_split
from common.data.classification_module import ClassificationDataModule
from common.data.pictures import loader
from common.data.transforms import eval_transform
from common.paths import runs_directory
from common.preprocess import Preprocess
from common.zeroshot import fill
from waveclip import WaveTower

__all__ = ["folder", "measure", "name_of", "render", "run", "stand_in"]

RECIPES = "common/photos_clip.yaml", "waveclip/photos.yaml"
SHARES = {"quarter": 0.25, "half": 0.5}
"""Operating points between the first step alone and all of both, by the share of val's pictures that is refined."""
SeedModels = Mapping[str, Any]
"""The WaveCLIP and the CLIPs of one seed, by the names that ``photo_models`` gives them."""
MODELS = TEACHER, WAVE, HALF, TRAINED_ON
_BATCH = 250


def run(smoke: bool = False) -> dict[str, Any] | None:
    """Train and measure the pictures in PHOTOS. ValueError: no such folder, or one that cannot be trained on."""
    return measure(_pictures(smoke), smoke)


def folder() -> Path:
    """Where the result goes: the folder ``results`` in OUT, or in the run directory."""
    return _out(name_of(Path(os.environ["PHOTOS"]))) / "results"


def _out(name: str) -> Path:
    return Path(os.environ.get("OUT") or runs_directory() / "photos" / name).expanduser()


def name_of(pictures: Path) -> str:
    """What results call a folder of pictures: its own name in small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", pictures.expanduser().resolve().name.lower()).strip("-") or "pictures"


def _pictures(smoke: bool) -> PhotoSet:
    """The pictures that the environment names; a smoke run draws some where it names none."""
    named = os.environ.get("PHOTOS")
    if not named and not smoke:
        raise ValueError(
            "set PHOTOS to a folder with one folder a class, or with folders train, val and test of such folders"
        )
    root = Path(named).expanduser().absolute() if named else stand_in(runs_directory() / "smoke" / "drawn")
    if not root.is_dir():
        raise ValueError(f"PHOTOS={named}: no folder at {root}")
    name, training = name_of(root), own_split(root, "train")
    if len(training.class_names) < 2:
        raise ValueError(f"{root} has one class; a classifier needs two folders of classes at least")
    # Prompts with either article, so that those of templates with {a} can be spelt too.
    texts = [f"a photo of {article} {label}." for label in training.class_names for article in ("a", "an")]
    texts += [fill(template, label) for template in training.templates for label in training.class_names]
    template = os.environ.get("ARCHITECTURE") or "common/photos_clip.json"
    work = runs_directory() / ("smoke/photos" if smoke else "photos") / name
    architecture = written_once(work / "architecture.json", spelling(texts, template), str(root))
    batch = min(read_recipe(RECIPES[0])["data"]["init_args"]["batch_size"], len(training))
    return PhotoSet(
        f"photos-{name}",
        root.name,
        *RECIPES,
        out=runs_directory() / "smoke" if smoke else _out(name),
        command=f"make reproduce-photos PHOTOS={root.name}",
        credit=os.environ.get("CREDIT") or f"Trained on the training pictures of the folder {root.name}.",
        data={"name": str(root), "held_out": None, "batch_size": batch},
        architecture=str(architecture.absolute()),
    )


def measure(pictures: PhotoSet, smoke: bool = False) -> dict[str, Any] | None:
    """Train the models of every seed where that is not done, and evaluate them; None: ONLY trained a part of them.

    smoke: a few steps, evaluated on the first PART pictures of each split; nothing is written but their weights.
    """
    data = pictures.module()
    seeds = 1 if smoke else _seeds()
    if only := os.environ.get("ONLY"):
        train(pictures, range(seeds), smoke, only)
        return None
    run_conditions = conditions(
        "embedded",
        seeds=seeds,
        dtype="float32",
        data=pictures.title,
        classes=data.class_names,
        template=data.templates[0],
        image_size=data.image_size,
        intervals="95 %, resampling pictures and training seeds",
    )
    trainings, weights = train(pictures, range(seeds), smoke)
    files = [file for of_seed in weights for file in of_seed.values()]
    run_conditions["weights"] = {run["name"]: digest(file) for run, file in zip(trainings, files, strict=True)}
    if not smoke:
        log = pictures.out / "results" / read_log.LOG.name
        read_log.record(pictures.name, pictures.name, files, log)
        run_conditions["test_reads"] = max(read_log.reads(file, pictures.name, log) for file in files)
    kept = [] if smoke else [pictures.record(pictures.runs(seed)[WAVE]).with_suffix(".npz") for seed in range(seeds)]
    measured = evaluate(weights, data, kept, smoke)
    result = {"name": pictures.name, "conditions": run_conditions, "runs": trainings, **measured}
    if not smoke:
        write_cards(pictures, trainings, result)
    return result


def _seeds() -> int:
    text = os.environ.get("SEEDS") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"SEEDS={text} is no number of trainings; 1 is quick, and a headline needs 3")
    return int(text)


@torch.no_grad()
def evaluate(
    weights: Sequence[Weights], data: ClassificationDataModule, kept: Sequence[Path], smoke: bool = False
) -> dict[str, Any]:
    """All parts of the result that come from the models' answers.

    weights: of every seed.  kept: where each seed's WaveCLIP's answers are written, for tables over several data sets;
    empty: nowhere.
    """
    parts = {"val": data.val_pictures, "test": data.test_pictures}
    if smoke:
        parts = {split: part.subset(range(min(PART, len(part)))) for split, part in parts.items()}
    models = [
        {model: (WaveTower if model == WAVE else CLIP).load(file).eval() for model, file in files.items()}
        for files in weights
    ]
    read = [{split: _answers(of_seed, part, data) for split, part in parts.items()} for of_seed in models]
    if kept:
        for path, by_split in zip(kept, read, strict=True):
            answers.write(path, {split: by_model[WAVE] for split, by_model in by_split.items()})
    val, test = (
        [controls.seed_answers(*(by_split[split][model] for model in MODELS)) for by_split in read] for split in parts
    )
    teacher, wave, half = (models[0][model] for model in (TEACHER, WAVE, HALF))
    size = data.image_size
    costs = controls.Costs(cost(teacher.image_tower, size), exit_costs(wave, size), cost(half.image_tower, size // 2))
    return {
        "pictures": {split: len(part) for split, part in parts.items()},
        "levels": {split: _levels(seen[0]) for split, seen in (("val", val), ("test", test))},
        "rows": controls.rows(val, test, costs, SHARES),
        "savings": controls.savings(val, test, costs, 20 if smoke else RESAMPLES),
        "curves": controls.curves(test, costs),
        "ladder": _ladder(models, data, parts["val"], smoke),
        "reducers": _reducers(models, parts, data, smoke),
    }


def _answers(models: SeedModels, part: ClassificationSet, data: ClassificationDataModule) -> dict[str, answers.Answers]:
    """What each model of a seed answers for the pictures, read at its own size."""
    return {
        name: answers.answers(
            model,
            models[TEACHER] if name == WAVE else model,
            loader(part, _halved(data) if name == HALF else data.preprocess, _BATCH),
            data.class_prompts,
        )
        for name, model in models.items()
    }


def _halved(data: ClassificationDataModule) -> Preprocess:
    return replace(data.preprocess, size=data.image_size // 2)


def _levels(answers: controls.SeedAnswers) -> dict[str, dict[str, Any]]:
    """Accuracy, interval and number of pictures of seed 0's models."""
    right = {name: torch.from_numpy(correct) for name, correct in answers.right().items()}
    return {name: {**accuracy_of(correct), "pictures": len(correct)} for name, correct in right.items()}


def _ladder(
    models: Sequence[SeedModels],
    data: ClassificationDataModule,
    val: ClassificationSet,
    smoke: bool,
) -> list[dict[str, Any]]:
    """The reference ladder on val."""
    count = min(len(data.training), 300 if smoke else reference_ladder.TRAINED_ON)
    chosen = sorted(Random("ladder").sample(range(len(data.training)), count))
    full = data.preprocess
    shown, labels = _arrays(val, full)
    rows = reference_ladder.without_training(
        len(data.class_names), _arrays(data.training.subset(chosen), full), (shown, labels)
    )
    small, grey = _arrays(val, _halved(data))[0], [reference_ladder.grey(picture) for picture in shown]
    for row, model, seen in (
        (reference_ladder.HALF, HALF, small),
        (reference_ladder.FULL, TEACHER, shown),
        (reference_ladder.FULL_IN_GREY, TEACHER, grey),
    ):
        right = [reference_ladder.named_right(of_seed[model], seen, labels, data.class_prompts) for of_seed in models]
        rows.append(reference_ladder.measured(row, right))
    return rows


def _arrays(pictures: ClassificationSet, preprocess: Preprocess) -> reference_ladder.Labelled:
    transform = eval_transform(preprocess)
    shown = [transform(pictures.picture(index), Random(0)) for index in range(len(pictures))]
    return shown, torch.tensor(pictures.labels)


def _reducers(
    models: Sequence[SeedModels],
    parts: Mapping[str, ClassificationSet],
    data: ClassificationDataModule,
    smoke: bool,
) -> list[dict[str, Any]]:
    """Token reducers, alone and within WaveCLIP's fine level, beside its controls, as on the frontier.

    models: of every seed. All see some pictures of each class.
    """
    batches = {}
    for split, part in parts.items():
        count = min(len(part), 250 if smoke else frontier.PICTURES[split])
        spread = part.subset([index * len(part) // count for index in range(count)])  # classes follow one another
        batches[split] = loader(spread, data.preprocess, frontier.BATCH)
    timed = torch.cat([batch["image"] for batch in batches["test"]])[: frontier.BATCH if smoke else frontier.TIMED]
    by_name = {name: {seed: of_seed[name] for seed, of_seed in enumerate(models)} for name in MODELS}
    beside = controls_of(by_name[TRAINED_ON], by_name[HALF], data.preprocess.interpolation)
    budgets, rounds = (frontier.BUDGETS[1:3], 1) if smoke else (frontier.BUDGETS, frontier.ROUNDS)
    students = {seed: (wave, by_name[TEACHER][seed]) for seed, wave in by_name[WAVE].items()}
    methods = families(by_name[TEACHER], students, FEW, budgets, controls=beside)
    composing = partial(compose, students=students, smoke=smoke)
    splits = batches["val"], batches["test"]
    return frontier.measure(methods, composing, *splits, data.class_prompts, budgets, timed, rounds)


def stand_in(root: Path) -> Path:
    """Draw a folder of three classes, 20 pictures each: shapes in random colours and places. It serves checks alone."""
    corners = {"circle": None, "square": 4, "triangle": 3}
    for name, count in corners.items():
        rng = np.random.default_rng(len(name))
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            ground, colour = (tuple(map(int, values)) for values in rng.integers(0, 256, (2, 3)))
            (x, y), radius = rng.integers(14, 26, 2), int(rng.integers(6, 13))
            image = Image.new("RGB", (40, 40), ground)
            draw, circle = ImageDraw.Draw(image), (int(x), int(y), radius)
            if count is None:
                draw.circle(circle[:2], radius, colour)
            else:
                draw.regular_polygon(circle, count, int(rng.integers(0, 90)), colour)
            image.save(root / name / f"{number:02d}.png")
    return root

"""The trainings behind a benchmark on pictures of classes: a CLIP, its WaveCLIP and their controls, for each seed.

A finished run leaves its weights, their card and a record in the benchmark's folder. A later call, on any machine,
takes what fits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import read_recipe
from benchmarks.training.export import card, from_checkpoint, save
from benchmarks.training.run import RECIPES, Run, announce, fit, last_checkpoint
from benchmarks.waveclip import controls
from common.clip import load_architecture
from common.conditions import digest
from common.data.classification_module import ClassificationDataModule
from common.paths import runs_directory
from common.tokenizer import encode

CLIP, WAVE, TRAINED_ON, HALF = "clip", "waveclip", "clip-trained-on", "clip-half"
"""The models of one seed: the teacher, the student, the teacher trained on, the half-resolution CLIP."""
LEVELS = {CLIP: ("teacher",), WAVE: ("coarse", "fine"), TRAINED_ON: (controls.TRAINED_ON,), HALF: (controls.HALF,)}
"""The names of each model's levels in a result."""
OBSERVERS = ("lightning.pytorch.callbacks.RichProgressBar", "lightning.pytorch.callbacks.ModelCheckpoint")
"""Callbacks of recipes that change nothing of what is trained."""
Weights = Mapping[str, Path]
"""The weights file of each model of one seed."""


@dataclass(frozen=True)
class PhotoSet:
    """Pictures of classes, and where their models come from and go to.

    name: of result and runs, such as "photos-cifar10".  title: in tables.
    clip, wave: the recipes.
    data: arguments of the recipes' data module that name these pictures.
    architecture: the CLIP's .json file, where it is not the recipe's.
    out: the folder of results/ and weights/.
    command: makes it all again.  credit: the line about the pictures that their weights carry.
    losses: recipe -> its first losses on stand-in pictures, by which the code is checked for drift.
    """

    name: str
    title: str
    clip: str
    wave: str
    out: Path
    command: str
    credit: str
    data: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    losses: Callable[[str], list[float]] | None = None

    def module(self) -> ClassificationDataModule:
        """The data module of both recipes, which reads in the calling process."""
        args = {**read_recipe(self.clip)["data"]["init_args"], **self._data(), "num_workers": 0}
        return ClassificationDataModule(**args)

    def _data(self) -> dict[str, Any]:
        return {**self.data, **({"architecture": self.architecture} if self.architecture else {})}

    def places(self, run: Run, teacher: Path | None) -> dict[str, dict[str, Any]]:
        """The settings of a run that say where this machine has the pictures and the teacher's weights.

        teacher: None for the teacher's own run.
        """
        model: dict[str, Any] = {}
        if self.architecture:
            model["teacher" if run.recipe == self.wave else "architecture"] = self.architecture
        if teacher:
            model["weights"] = str(teacher.absolute())
        return {"data": self._data(), "model": model}

    def record(self, run: Run) -> Path:
        """Where the result of a run's training lies; the file is the mark that the run is finished."""
        return self.out / "results" / "retrain" / f"{run.name}.json"

    def asked(self, run: Run, teacher: Run | None) -> dict[str, Any]:
        """What must be alike in a run and in a record, so that the record is this run's.

        teacher: of a student, or of the teacher trained on; its weights exist.
        """
        recipe = read_recipe(run.recipe)
        architecture = self.architecture or recipe["data"]["init_args"]["architecture"]
        return {
            "recipe": f"{run.recipe} {_hash(training_of(recipe))}",
            "steps": run.steps,
            "settings": run.settings,
            "architecture": _hash(load_architecture(architecture)),
            "teacher": None if teacher is None else digest(teacher.output),
        }

    def runs(self, seed: int = 0) -> dict[str, Run]:
        """The four trainings of a seed in their order; their weights go to ``out``."""
        clip, wave = (read_recipe(recipe) for recipe in (self.clip, self.wave))
        whole, more = (recipe["trainer"]["max_steps"] for recipe in (clip, wave))
        architecture = load_architecture(self.architecture or clip["model"]["init_args"]["architecture"])
        half = architecture["vision_cfg"]["image_size"] // 2

        def run(model: str, length: int | None = None, settings: Mapping[str, Any] | None = None) -> Run:
            recipe = self.wave if model == WAVE else self.clip
            minutes = RECIPES[recipe] if length is None else round(RECIPES[recipe] * length / whole)
            name, ending = f"{self.name}-{model}", f"-seed{seed}" if seed else ""
            output = self.out / "weights" / f"{name.replace('-', '_')}{ending}.safetensors"
            return Run(name + ending, recipe, minutes, seed, settings or {}, output, target=self.command, length=length)

        rate = {"model": {"learning_rate": wave["model"]["init_args"]["learning_rate"]}}
        small = {part: {"image_size": half} for part in ("model", "data")}
        models = {CLIP: (), WAVE: (), TRAINED_ON: (more, rate), HALF: (whole + more, small)}
        return {model: run(model, *others) for model, others in models.items()}


def train(
    pictures: PhotoSet, seeds: Sequence[int], smoke: bool, only: str = "*"
) -> tuple[list[dict[str, Any]], list[Weights]]:
    """Train what is not finished; returns each training's part of the result, and each seed's weights.

    only: a pattern of names; other runs are left as they are.
    ValueError: no name fits; a run's teacher is not finished; the record of a finished run tells of another training.
    """
    by_seed = [pictures.runs(seed) for seed in seeds]
    names = [run.name for runs in by_seed for run in runs.values()]
    if not any(fnmatchcase(name, only) for name in names):
        raise ValueError(f"ONLY={only} is no run of SEEDS={len(seeds)}; there are {', '.join(names)}")
    trainings = [
        _train(pictures, run, runs[CLIP] if model in (WAVE, TRAINED_ON) else None, smoke)
        for runs in by_seed
        for model, run in runs.items()
        if fnmatchcase(run.name, only)
    ]
    return trainings, [{model: run.output for model, run in runs.items()} for runs in by_seed]


def _train(pictures: PhotoSet, run: Run, teacher: Run | None, smoke: bool) -> dict[str, Any]:
    """The training's part of the result, of the record where that is there. A smoke run trains always."""
    folder = runs_directory() / ("smoke" if smoke else "retrain") / run.name
    if teacher and not (teacher.output.is_file() if smoke else _finished(pictures, teacher)):
        raise ValueError(
            f"{run.name} starts from {teacher.name}, which is not finished in {pictures.out}; train that one first, or "
            "both by one ONLY"
        )
    places = pictures.places(run, teacher.output if teacher else None)
    if smoke:
        shutil.rmtree(folder, ignore_errors=True)
        shortened = replace(run, length=None, minutes=RECIPES[run.recipe])  # the overlay has the steps
        result = fit(shortened, folder, "common/smoke.yaml", places, apart=False)
        save(from_checkpoint(last_checkpoint(folder), run.recipe), run.output)
        return result
    known = _finished(pictures, run, teacher)
    announce(run, known is not None)
    if known:
        if not _card(run).is_file():
            _write_card(pictures, run, known)
        return known
    asked, begun = pictures.asked(run, teacher), folder / "asked.json"
    if begun.is_file():
        _read(begun, asked, folder)
    _write(begun, asked)
    result = fit(run, folder, places=places)
    save(from_checkpoint(last_checkpoint(folder), run.recipe), run.output)
    if pictures.losses and run.length is None and not run.seed:
        result["first_losses"] = pictures.losses(run.recipe)
    result = asked | result | {"weights": digest(run.output)}
    _write_card(pictures, run, result)
    _write(pictures.record(run), result)  # last: it marks the run as finished
    return result


def training_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides what it trains: not what it shows, logs and saves meanwhile."""
    trainer = {name: value for name, value in recipe["trainer"].items() if name != "log_every_n_steps"}
    callbacks = [callback for callback in trainer.pop("callbacks", []) if callback["class_path"] not in OBSERVERS]
    return {**recipe, "trainer": {**trainer, "callbacks": callbacks}}


def _finished(pictures: PhotoSet, run: Run, teacher: Run | None = None) -> dict[str, Any] | None:
    """The record of a finished run; None: it is not finished. ValueError: the record tells of another training."""
    record = pictures.record(run)
    if not record.is_file():
        return None
    weights = digest(run.output) if run.output.is_file() else "missing"
    return _read(record, pictures.asked(run, teacher) | {"weights": weights}, runs_directory() / "retrain" / run.name)


def _read(file: Path, asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The contents of a record, or of what a run in ``folder`` began with. ValueError: they differ from ``asked``."""
    known = json.loads(file.read_text())
    for what, here in asked.items():
        if known.get(what) != here:
            raise ValueError(
                f"{file} tells of another training: it has {what} {known.get(what)}, here it is {here}; bring back "
                f"what it tells of, or remove it and {folder} to train again"
            )
    return known


def _write(file: Path, contents: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def _hash(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def write_cards(pictures: PhotoSet, trainings: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """The cards of seed 0's models with their accuracies; other seeds keep the cards that their trainings wrote."""
    by_name = {training["name"]: training for training in trainings}
    for model, run in pictures.runs().items():
        measured = {split: {level: part[level] for level in LEVELS[model]} for split, part in result["levels"].items()}
        described = by_name[run.name] | measured | {"names": len(result["conditions"]["classes"])}
        _write_card(pictures, run, described)


def _write_card(pictures: PhotoSet, run: Run, described: Mapping[str, Any]) -> None:
    _card(run).write_text(card(run.output, dict(described), pictures.credit, pictures.command))


def _card(run: Run) -> Path:
    """The card beside a run's weights, which carries the line about the pictures."""
    return run.output.with_suffix(".md")


def spelling(prompts: Sequence[str], like: str) -> dict[str, Any]:
    """The architecture of the file ``like`` with the vocabulary of these prompts alone."""
    architecture = load_architecture(like)
    ids = [encode(prompt) for prompt in prompts]
    kept = sorted({token for text in ids for token in text})
    text = architecture["text_cfg"]
    length = max(text["context_length"], *map(len, ids))
    return architecture | {"text_cfg": text | {"context_length": length, "vocab_size": len(kept), "vocabulary": kept}}


def written_once(file: Path, contents: Mapping[str, Any], pictures: str) -> Path:
    """Write a JSON file that all runs of these pictures depend on. ValueError: it holds something else already."""
    text = json.dumps(contents, ensure_ascii=False) + "\n"
    if file.is_file() and file.read_text() != text:
        raise ValueError(
            f"{file} comes from earlier runs with other classes than those of {pictures}, or with another "
            f"ARCHITECTURE; give this folder another name, or remove {file.parent} and the run folders of that name"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file

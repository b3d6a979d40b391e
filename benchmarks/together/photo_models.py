"""The trainings behind a benchmark on pictures of classes: a CLIP, its WaveCLIP and their controls, for each seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import read_recipe
from benchmarks.training.export import card, from_checkpoint, save
from benchmarks.training.run import RECIPES, Run, fit, last_checkpoint
from common.clip import load_architecture
from common.data.classification_module import ClassificationDataModule
from common.paths import runs_directory
from common.tokenizer import encode

CLIP, WAVE, TRAINED_ON, HALF = "clip", "waveclip", "clip-trained-on", "clip-half"
"""The models of one seed: the teacher, the student, the teacher trained on, the half-resolution CLIP."""
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

    def runs(self, seed: int = 0) -> dict[str, Run]:
        """The four trainings of a seed in their order. The weights of seed 0's CLIP and WaveCLIP go to ``out``."""
        clip, wave = (read_recipe(recipe) for recipe in (self.clip, self.wave))
        whole, more = (recipe["trainer"]["max_steps"] for recipe in (clip, wave))
        architecture = load_architecture(self.architecture or clip["model"]["init_args"]["architecture"])
        half = architecture["vision_cfg"]["image_size"] // 2

        def run(model: str, length: int | None = None, settings: Mapping[str, Any] | None = None) -> Run:
            recipe = self.wave if model == WAVE else self.clip
            minutes = RECIPES[recipe] if length is None else round(RECIPES[recipe] * length / whole)
            name, file = f"{self.name}-{model}", f"{self.name.replace('-', '_')}_{model}.safetensors"
            output = self.out / "weights" / file if not seed and model in (CLIP, WAVE) else None
            name = f"{name}-seed{seed}" if seed else name
            return Run(name, recipe, minutes, seed, settings or {}, output, target=self.command, length=length)

        rate = {"model": {"learning_rate": wave["model"]["init_args"]["learning_rate"]}}
        small = {part: {"image_size": half} for part in ("model", "data")}
        models = {CLIP: (), WAVE: (), TRAINED_ON: (more, rate), HALF: (whole + more, small)}
        return {model: run(model, *others) for model, others in models.items()}


def train(pictures: PhotoSet, seeds: Sequence[int], smoke: bool) -> tuple[list[dict[str, Any]], list[Weights]]:
    """Train what is not finished; returns each training's part of the result, and each seed's weights."""
    trainings, weights = [], []
    for seed in seeds:
        files: dict[str, Path] = {}
        for model, run in pictures.runs(seed).items():
            teacher = files[CLIP] if model in (WAVE, TRAINED_ON) else None
            result, files[model] = _train(pictures, run, teacher, smoke)
            trainings.append(result)
        weights.append(files)
    return trainings, weights


def _train(pictures: PhotoSet, run: Run, teacher: Path | None, smoke: bool) -> tuple[dict[str, Any], Path]:
    folder = runs_directory() / ("smoke" if smoke else "retrain") / run.name
    output = run.output or folder / f"{run.name}.safetensors"
    places = pictures.places(run, teacher)
    if smoke:
        shutil.rmtree(folder, ignore_errors=True)
        run = replace(run, length=None, minutes=RECIPES[run.recipe])  # the overlay has the steps
    result = fit(run, folder, "common/smoke.yaml" if smoke else None, places, apart=not smoke)
    save(from_checkpoint(last_checkpoint(folder), run.recipe), output)
    if run.output and pictures.losses and not smoke:
        result["first_losses"] = pictures.losses(run.recipe)
    return result, output


def write_cards(pictures: PhotoSet, trainings: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """A card beside the weights of seed 0's CLIP and WaveCLIP."""
    by_name = {training["name"]: training for training in trainings}
    runs = pictures.runs()
    for model, levels in ((CLIP, ("teacher",)), (WAVE, ("coarse", "fine"))):
        run = runs[model]
        measured = {split: {level: part[level] for level in levels} for split, part in result["levels"].items()}
        described = by_name[run.name] | measured | {"names": len(result["conditions"]["classes"])}
        run.output.with_suffix(".md").write_text(
            card(run.output, described, target=pictures.command, attribution=pictures.credit)
        )


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

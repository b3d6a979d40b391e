"""Trains the embedded models again, each by its recipe: `python -m benchmarks retrain` (`--list`: the runs).

Every run has a folder in $EFFCLIP_RUNS/retrain: it goes on from the last checkpoint there, and is skipped
when its result stands there. Its result is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from benchmarks import RESULTS, ROOT
from benchmarks.embedded import GUIDE, STUDENT, STUDENT_96, TEACHER, TEACHER_96, batches
from benchmarks.training.drift import first_losses
from benchmarks.training.export import card, from_checkpoint, save
from benchmarks.waveclip.observed import observe
from common.checkpoints import read_plain
from common.clip import read_record
from common.conditions import conditions
from common.data.embedded.module import EmbeddedDataModule, class_names
from common.evaluate.accuracy import wilson_interval, zero_shot
from common.models import load_model
from common.paths import runs_directory
from common.zeroshot import embed_prompts
from mlip.guide_mae import GuideMAE
from waveclip import WaveTower

STORED = RESULTS / "retrain"
RECIPES = {
    "common/embedded_clip.yaml": 26,
    "waveclip/embedded.yaml": 50,
    "common/fashion_mnist_clip.yaml": 7,
    "waveclip/fashion_mnist.yaml": 8,
    "common/embedded_clip_96.yaml": 15,
    "waveclip/embedded_96.yaml": 15,
    "mlip/guide_mae.yaml": 3,
    "mlip/embedded.yaml": 2,
    "patchrank/embedded_predictor.yaml": 1,
    "patchrank/embedded_avit.yaml": 1,
    "patchrank/embedded_prompts.yaml": 1,
}
"""The recipes, and how many minutes their whole length takes on 2 cores."""
Evaluation = Callable[[Path, str], dict[str, Any]]
"""What a result says about a weights file and its recipe."""
Settings = Mapping[str, Mapping[str, Any]]
"""Changes of a recipe: arguments of the "model" and of the "data"."""


def options(settings: Settings) -> list[str]:
    """Settings as options of the command line."""
    return [
        word
        for section, arguments in settings.items()
        for name, value in arguments.items()
        for word in (f"--{section}.init_args.{name}", "null" if value is None else str(value))
    ]


@dataclass(frozen=True)
class Run:
    """One training: a recipe, or a part of its length with some settings changed.

    minutes: on 2 cores. A shorter run has a whole schedule of its own: every number of steps in the model's
        settings is the same share of the recipe's.
    output: where the weights go if they are committed.
    places: settings that no record repeats, since they only say where this machine has a file.
    target: the command that makes this run alone, where it is not ``make retrain ONLY=name``.
    """

    name: str
    recipe: str
    minutes: int
    seed: int = 0
    settings: Settings = field(default_factory=dict)
    output: Path | None = None
    places: Settings = field(default_factory=dict)
    target: str | None = None

    @property
    def steps(self) -> int:
        """Training steps: the recipe's, or the same share of them as of its minutes.

        ``last.ckpt`` is the last step only where its interval divides the steps (Lightning saves at the end of
        a training only what was never saved before), so a part is cut to a multiple of it.
        ValueError: the interval does not divide the whole recipe's steps.
        """
        trainer = self._recipe()["trainer"]
        whole = trainer["max_steps"]
        (every,) = (
            callback["init_args"]["every_n_train_steps"]
            for callback in trainer["callbacks"]
            if "every_n_train_steps" in callback.get("init_args", {})
        )
        if self.minutes == RECIPES[self.recipe]:
            if whole % every:
                raise ValueError(
                    f"{self.recipe} saves every {every} of {whole} steps, so its last checkpoint is not its last "
                    "step; let every_n_train_steps divide max_steps"
                )
            return whole
        steps = round(whole * self.minutes / RECIPES[self.recipe])
        return steps // every * every or steps

    def _recipe(self) -> dict[str, Any]:
        return yaml.safe_load((ROOT / self.recipe).read_text())

    def arguments(self, overlay: str | None = None) -> list[str]:
        """What follows `lightning fit`."""
        arguments = ["-c", self.recipe]
        if self.minutes < RECIPES[self.recipe]:
            recipe, steps = self._recipe(), self.steps
            arguments += ["--trainer.max_steps", str(steps)]
            schedule = {
                name: round(value * steps / recipe["trainer"]["max_steps"])
                for name, value in recipe["model"]["init_args"].items()
                if name.endswith("_steps")
            }
            arguments += options({"model": schedule})
        if self.seed:
            arguments += ["--seed_everything", str(self.seed), "--data.init_args.seed", str(self.seed)]
        overlays = ["-c", overlay] if overlay else []
        return [*arguments[:2], *overlays, *arguments[2:], *options(self.settings)]


_WAVE = "waveclip/embedded.yaml"
RUNS = (
    Run("teacher", "common/embedded_clip.yaml", 26, output=TEACHER),
    Run("waveclip", _WAVE, 50, output=STUDENT),
    *(Run(f"waveclip-seed{seed}", _WAVE, 15, seed) for seed in range(3)),
    Run("waveclip-short", _WAVE, 3),
    Run("waveclip-new-only", _WAVE, 3, settings={"model": {"train": "new"}}),
    Run("waveclip-random-start", _WAVE, 3, settings={"model": {"start": "random"}}),
    Run("teacher-96", "common/embedded_clip_96.yaml", 15, output=TEACHER_96),
    Run("waveclip-96", "waveclip/embedded_96.yaml", 15, output=STUDENT_96),
    Run("guide", "mlip/guide_mae.yaml", 3, output=GUIDE),
)


def chosen(only: str | None) -> list[Run]:
    """The run of that name, or all. ValueError: there is none."""
    runs = [run for run in RUNS if only in (None, "", run.name)]
    if not runs:
        raise ValueError(f"ONLY={only} is no run; there are {', '.join(run.name for run in RUNS)}")
    return runs


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished. ONLY=NAME: that run; CONFIG=FILE: an overlay on the recipes.

    With an overlay the runs have folders of their own, where weights and results stay. A smoke run lists.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks retrain", description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores (LIST=1)")
    listing = parser.parse_args(arguments).list or any(os.environ.get(name) for name in ("LIST", "SMOKE"))
    overlay = os.environ.get("CONFIG") or None
    if overlay and not Path(overlay).is_file():
        raise ValueError(f"CONFIG={overlay}: no file at {Path(overlay).absolute()}")
    work(chosen(os.environ.get("ONLY")), evaluate, listing, overlay)
    return 0


def work(runs: Sequence[Run], evaluate: Evaluation, listing: bool, overlay: str | None = None) -> None:
    """Print each run with its state, and unless ``listing`` train what is not finished."""
    console = Console()
    for run in runs:
        folder = runs_directory() / "retrain" / (run.name + (f"-{Path(overlay).stem}" if overlay else ""))
        state = "finished" if (folder / "result.json").is_file() else f"about {run.minutes} min"
        typed = shlex.join(command(run, overlay))
        console.print(f"{run.name:<23} {state:<14}{typed}", markup=False, highlight=False, soft_wrap=True)
        if not listing and state != "finished":
            train(run, folder, evaluate, overlay)


def command(run: Run, overlay: str | None = None) -> list[str]:
    """The command line that a reader would type."""
    return ["lightning", "fit", *run.arguments(overlay)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest ``last.ckpt`` of a run that was interrupted."""
    return max(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def train(run: Run, folder: Path, evaluate: Evaluation, overlay: str | None = None) -> dict[str, Any]:
    """Train, export, evaluate, write the result. ValueError: the training failed."""
    made = fit(run, folder, overlay)
    committed = run.output if run.output and not overlay else None
    weights = committed or folder / "weights.safetensors"
    module = from_checkpoint(last_checkpoint(folder), run.recipe)
    save(module, weights)
    found = reconstruction(module) if isinstance(module, GuideMAE) else evaluate(weights, run.recipe)
    result = {**made, **found}
    if committed:
        result["first_losses"] = first_losses(run.recipe, settings=run.settings)
        committed.with_suffix(".md").write_text(card(committed, result, run.target))
    result_file = folder / "result.json"
    # The folder's last: it says "finished".
    for path in [result_file] if overlay else [STORED / f"{run.name}.json", result_file]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def fit(run: Run, folder: Path, overlay: str | None = None, places: Settings | None = None) -> dict[str, Any]:
    """Train in a process of its own, from the folder's last checkpoint on; what a result says about the training.

    places: settings that are no part of the run, such as where its data lies. Nothing is trained when the last
    checkpoint is the last step. ValueError: the training failed.
    """
    steps = None if overlay else run.steps  # an overlay may change them
    folder.mkdir(parents=True, exist_ok=True)
    stated, clock = folder / "conditions.json", folder / "minutes.json"
    if not stated.is_file():  # those of the start, also when the run goes on later
        stated.write_text(json.dumps(conditions("embedded", seeds=1, seed=run.seed, steps=steps)))
    checkpoint = last_checkpoint(folder)
    if checkpoint is None or steps_of(checkpoint) != steps:
        arguments = [
            *run.arguments(overlay),
            *options(run.places),
            *options(places or {}),
            "--trainer.default_root_dir",
            str(folder.absolute()),
        ]
        if checkpoint:
            arguments += ["--ckpt_path", str(checkpoint.absolute())]
        code = _timed([sys.executable, "-m", "common.cli", "fit", *arguments], clock)
        if code:
            raise ValueError(f"run {run.name} ended with code {code}; the same command continues it")
        checkpoint = last_checkpoint(folder)
    if not clock.is_file():
        raise ValueError(
            f"run {run.name} is trained, but what timed it was killed before; write its minutes into {clock}, such as "
            "[26.0], or remove its folder to train again"
        )
    minutes = json.loads(clock.read_text())
    return {
        "name": run.name,
        "command": shlex.join(command(run, overlay)),
        "conditions": json.loads(stated.read_text()),
        "minutes": sum(minutes),
        "legs": len(minutes),
        "steps": steps_of(checkpoint),
    }


def steps_of(checkpoint: Path) -> int:
    """The optimiser steps behind a checkpoint."""
    return read_plain(checkpoint)["global_step"]


def _timed(line: list[str], record: Path) -> int:
    """Run a command line for its exit code; ``record`` keeps the minutes of all its runs."""
    legs = json.loads(record.read_text()) if record.is_file() else []
    start = time.monotonic()
    try:
        code = subprocess.run(line, cwd=ROOT).returncode
    finally:
        legs.append((time.monotonic() - start) / 60)
        record.write_text(json.dumps(legs))
    return code


def evaluate(
    weights: Path, recipe: str, splits: Sequence[str] = ("val", "test"), count: int | None = None
) -> dict[str, Any]:
    """Accuracy by name on some splits, of the weights of any CLIP, or of a WaveCLIP's by level.

    recipe: of the training, which says how large the pictures are, and a WaveCLIP's teacher.
    count: only the first pictures of a split, a multiple of 250.
    """
    settings = yaml.safe_load((ROOT / recipe).read_text())
    size = settings["data"]["init_args"].get("image_size")
    student = WaveTower.load(weights).eval() if "wave" in read_record(weights) else None
    clip = load_model(str(ROOT / settings["model"]["init_args"]["weights"] if student else weights)).text_encoder()
    prompts = EmbeddedDataModule().class_prompts
    found: dict[str, Any] = {"names": len(class_names("seen"))}
    with torch.no_grad():
        for split in splits:
            pictures = batches(split, count, size)
            if student is None:
                levels = {"top1": zero_shot(clip, pictures, embed_prompts(clip, prompts)).correct}
            else:
                right = observe(clip, student, pictures, prompts).correct
                names = ["coarse", *(f"level {step}" for step in range(1, len(right) - 1)), "fine"]
                levels = dict(zip(names, right, strict=True))
            found[split] = {name: _accuracy(right) for name, right in levels.items()}
    return found


def _accuracy(right: torch.Tensor) -> dict[str, Any]:
    """Of right answers, bool [M]."""
    correct, pictures = int(right.sum()), len(right)
    return {"accuracy": correct / pictures, "interval": wilson_interval(correct, pictures), "pictures": pictures}


@torch.no_grad()
def reconstruction(module: GuideMAE) -> dict[str, Any]:
    """A masked autoencoder's loss on ``val`` and ``test``, with the masks of its own validation."""
    found: dict[str, Any] = {}
    for split in ("val", "test"):
        total, pictures = 0.0, 0
        for place, batch in enumerate(batches(split, None)):
            loss = module.loss(batch["image"], torch.Generator().manual_seed(place))
            total, pictures = total + float(loss) * len(batch["image"]), pictures + len(batch["image"])
        found[split] = {"masked patches": {"loss": total / pictures, "pictures": pictures}}
    return found


def results() -> dict[str, dict[str, Any]]:
    """The stored result of every run that was made."""
    paths = {run.name: STORED / f"{run.name}.json" for run in RUNS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def table() -> str:
    """All runs as a Markdown table; what was not run says so."""
    known = results()
    lines = ["| run | minutes | coarse, test | fine, test | command |", "|---|---:|---:|---:|---|"]
    for run in RUNS:
        made = known.get(run.name)
        typed = f"`{shlex.join(command(run))}`"
        if made is None:
            lines.append(f"| {run.name} | – | not run | not run | `make retrain ONLY={run.name}` |")
            continue
        test = made["test"]
        coarse, fine = (_cell(test.get(name)) for name in ("coarse", "fine" if "fine" in test else "top1"))
        lines.append(f"| {run.name} | {made['minutes']:.0f} | {coarse} | {fine} | {typed} |")
    note = f"Top-1 among {len(class_names('seen')):,} names; a teacher has one level. {_spread(known)}"
    return "\n".join([*lines, "", note.strip()]) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _spread(known: dict[str, dict[str, Any]]) -> str:
    """The range over the training seeds of the 15-minute runs."""
    seeds = [made["test"] for name, made in known.items() if name.startswith("waveclip-seed")]
    if len(seeds) < 2:
        return ""
    said = []
    for level in ("coarse", "fine"):
        values = [100 * test[level]["accuracy"] for test in seeds]
        said.append(f"{level} {min(values):.1f} to {max(values):.1f}")
    return f"Over {len(seeds)} training seeds of the 15-minute runs: {', '.join(said)}."

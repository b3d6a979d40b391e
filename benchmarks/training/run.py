"""One training run: its command line, its folder of checkpoints, its weights and its result.

Every run has a folder in $EFFCLIP_RUNS/retrain. A run continues from the last checkpoint there, and is skipped when its
result is there. The result is written as soon as it is known. `make retrain` also skips a run whose result and weights
are committed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import RESULTS, ROOT, read_recipe
from benchmarks.training.drift import first_losses, precision_here
from benchmarks.training.export import card, from_checkpoint, save
from common.checkpoints import read_plain
from common.cli import main as lightning
from common.conditions import conditions
from common.data.embedded.module import EmbeddedDataModule, scenes_of
from common.paths import runs_directory
from mlip.guide_mae import GuideMAE

STORED = RESULTS / "retrain"
WEIGHTS_FILE = "weights.safetensors"
"""The weights in a run's folder, of a run whose weights are not committed."""
RECIPES = {
    "common/embedded_clip.yaml": 26,
    "common/fashion_mnist_clip.yaml": 7,
    "waveclip/fashion_mnist.yaml": 8,
    "common/photos_clip.yaml": 14,
    "waveclip/photos.yaml": 13,
    "common/shapes_clip.yaml": 45,
    "common/shapes_clip_half.yaml": 50,
    "common/shapes_clip_96.yaml": 35,
    "waveclip/shapes.yaml": 45,
    "waveclip/shapes_96.yaml": 35,
    "mlip/guide_shapes.yaml": 3,
    "mlip/shapes.yaml": 9,
    "mlip/filip_shapes.yaml": 9,
    "mlip/slip_shapes.yaml": 18,
    "mlip/declip_shapes.yaml": 18,
    "mlip/textures.yaml": 5,
    "patchrank/embedded_predictor.yaml": 1,
    "patchrank/embedded_avit.yaml": 1,
    "patchrank/embedded_crossget.yaml": 1,
    "patchrank/embedded_reducer_tuning.yaml": 1,
    "patchrank/embedded_dynamicvit.yaml": 20,
    "patchrank/embedded_attention_tuning.yaml": 17,
    "patchrank/embedded_prompts.yaml": 1,
    "patchrank/embedded_flip.yaml": 30,
    "patchrank/embedded_aclip.yaml": 60,
}
"""Minutes of each recipe's whole length on 2 cores."""
Evaluation = Callable[[Path, str], dict[str, Any]]
"""(weights file, recipe) -> what the result says about them."""
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
    """One training: a recipe, or another length of it, with some settings changed.

    minutes: on 2 cores. A run of another length has a whole schedule: one factor changes all numbers of steps in the
    recipe.
    settings: changes of the recipe.
    output: where the weights go if they are committed.
    places: settings that only say where this machine has a file; no record repeats them.
    target: the command that trains this run alone, where it is not ``make retrain ONLY=name``.
    length: training steps; None: the recipe's, cut by the same factor as its minutes.
    """

    name: str
    recipe: str
    minutes: int
    seed: int = 0
    settings: Settings = field(default_factory=dict)
    output: Path | None = None
    places: Settings = field(default_factory=dict)
    target: str | None = None
    length: int | None = None

    @property
    def weights(self) -> Path:
        """Where the trained weights lie: the committed file, or one in the run's folder."""
        return self.output or runs_directory() / "retrain" / self.name / WEIGHTS_FILE

    @property
    def steps(self) -> int:
        """Training steps: ``length``, or those that the minutes give.

        ``last.ckpt`` holds the last step only where its interval divides the steps, because Lightning saves at the end
        of a training only if it never saved before. So the steps of a shorter run are a multiple of the interval.
        ValueError: the interval does not divide the steps of the whole recipe.
        """
        if self.length is not None:
            return self.length
        trainer = read_recipe(self.recipe)["trainer"]
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

    def arguments(self, overlay: str | None = None) -> list[str]:
        """The arguments of `lightning fit`."""
        arguments, recipe, steps = ["-c", self.recipe], read_recipe(self.recipe), self.steps
        whole = recipe["trainer"]["max_steps"]
        if steps != whole:
            arguments += ["--trainer.max_steps", str(steps)]
            schedule = {
                name: round(value * steps / whole)
                for name, value in recipe["model"]["init_args"].items()
                if name.endswith("_steps")
            }
            arguments += options({"model": schedule})
        if self.seed:
            arguments += ["--seed_everything", str(self.seed), "--data.init_args.seed", str(self.seed)]
        overlays = ["-c", overlay] if overlay else []
        return [*arguments[:2], *overlays, *arguments[2:], *options(self.settings)]


def work(
    runs: Sequence[Run],
    evaluate: Evaluation,
    listing: bool,
    overlay: str | None = None,
    apart: bool = True,
    committed: bool = False,
) -> None:
    """Print each run with its state; unless ``listing``, train the runs that are not finished.

    apart: see ``fit``.  committed: see ``is_finished``.
    """
    for run in runs:
        finished = is_finished(run, overlay, committed)
        announce(run, finished, overlay)
        if not listing and not finished:
            train(run, folder_of(run, overlay), evaluate, overlay, apart)


def folder_of(run: Run, overlay: str | None = None) -> Path:
    """A run's folder; with an overlay it has one of its own."""
    return runs_directory() / "retrain" / (run.name + (f"-{Path(overlay).stem}" if overlay else ""))


def is_finished(run: Run, overlay: str | None = None, committed: bool = False) -> bool:
    """Whether a run's result is in its folder.

    committed: a result in ``STORED`` counts too, where the weights that belong beside it are there as well.
    """
    if (folder_of(run, overlay) / "result.json").is_file():
        return True
    weights_there = run.output is None or run.output.is_file()
    return committed and not overlay and weights_there and (STORED / f"{run.name}.json").is_file()


def announce(run: Run, finished: bool, overlay: str | None = None) -> None:
    """Print a run's line: its name, its state, its command."""
    state, typed = "finished" if finished else f"about {run.minutes} min", shlex.join(command(run, overlay))
    Console().print(f"{run.name:<23} {state:<14}{typed}", markup=False, highlight=False, soft_wrap=True)


def command(run: Run, overlay: str | None = None) -> list[str]:
    """The command line of a run, as a reader would type it."""
    return ["lightning", "fit", *run.arguments(overlay)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest ``last.ckpt`` of a run; None: it never saved one."""
    return max(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def train(
    run: Run, folder: Path, evaluate: Evaluation, overlay: str | None = None, apart: bool = True
) -> dict[str, Any]:
    """Train, export, evaluate, write the result. apart: see ``fit``. ValueError: the training failed."""
    made = fit(run, folder, overlay, apart=apart)
    committed = run.output if run.output and not overlay else None
    weights = committed or folder / WEIGHTS_FILE
    module = from_checkpoint(last_checkpoint(folder), run.recipe)
    save(module, weights)
    measured = reconstruction(module, run.recipe) if isinstance(module, GuideMAE) else evaluate(weights, run.recipe)
    result = {**made, **measured}
    if committed:
        result["first_losses"] = first_losses(run.recipe, settings=run.settings)
        data = read_recipe(run.recipe)["data"]["init_args"]
        attribution = scenes_of(data.get("revision", 1)).ATTRIBUTION
        committed.with_suffix(".md").write_text(card(committed, result, attribution, run.target))
    result_file = folder / "result.json"
    # The folder's own file comes last: it marks the run as finished.
    for path in [result_file] if overlay else [STORED / f"{run.name}.json", result_file]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def fit(
    run: Run, folder: Path, overlay: str | None = None, places: Settings | None = None, apart: bool = True
) -> dict[str, Any]:
    """Train from the folder's last checkpoint on; return the training's part of the result.

    places: settings that are no part of the run, such as the folder of its data.  apart: in a process of its own; for
    a few steps, starting one takes longer than they do. Nothing is trained when the last checkpoint is the last step.
    ValueError: the training failed.
    """
    steps = None if overlay else run.steps  # an overlay may change them
    folder.mkdir(parents=True, exist_ok=True)
    start, clock = folder / "conditions.json", folder / "minutes.json"
    if not start.is_file():  # a run that continues keeps the conditions of its start
        overlaid = read_recipe(overlay).get("trainer", {}) if overlay else {}
        trainer = read_recipe(run.recipe)["trainer"] | overlaid
        precision = trainer.get("precision") if torch.cuda.is_available() else precision_here(trainer)
        started = conditions("embedded", seeds=1, seed=run.seed, steps=steps, precision=precision)
        start.write_text(json.dumps(started))
    checkpoint = last_checkpoint(folder)
    if checkpoint is None or steps_of(checkpoint) != steps:
        arguments = [
            *run.arguments(overlay),
            *options(run.places),
            *options(places or {}),
            *_precision(json.loads(start.read_text())),
            "--trainer.default_root_dir",
            str(folder.absolute()),
        ]
        if checkpoint:
            arguments += ["--ckpt_path", str(checkpoint.absolute())]
        code = _timed(["fit", *arguments], clock, apart)
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
        "conditions": json.loads(start.read_text()),
        "minutes": sum(minutes),
        "legs": len(minutes),
        "steps": steps_of(checkpoint),
    }


def _precision(started: Mapping[str, Any]) -> list[str]:
    """The option that keeps the precision in which a run was started; none where it is not on record."""
    precision = started.get("precision")
    return ["--trainer.precision", precision] if precision else []


def steps_of(checkpoint: Path) -> int:
    """The number of optimiser steps of a checkpoint."""
    return read_plain(checkpoint)["global_step"]


def _timed(line: list[str], record: Path, apart: bool) -> int:
    """Run a `lightning` command line and return its exit code; append its minutes to the list in ``record``."""
    legs = json.loads(record.read_text()) if record.is_file() else []
    start = time.monotonic()
    try:
        if apart:
            code = subprocess.run([sys.executable, "-m", "common.cli", *line], cwd=ROOT).returncode
        else:
            code = lightning(line)
    finally:
        legs.append((time.monotonic() - start) / 60)
        record.write_text(json.dumps(legs))
    return code


@torch.no_grad()
def reconstruction(module: GuideMAE, recipe: str) -> dict[str, Any]:
    """A masked autoencoder's loss on its recipe's ``val``, with the masks of its validation."""
    data = EmbeddedDataModule(**read_recipe(recipe)["data"]["init_args"] | {"batch_size": 250})
    total, pictures = 0.0, 0
    for number, batch in enumerate(data.dataloader("val")):
        loss = module.loss(batch["image"], torch.Generator().manual_seed(number))
        total, pictures = total + float(loss) * len(batch["image"]), pictures + len(batch["image"])
    return {"val": {"masked patches": {"loss": total / pictures, "pictures": pictures}}}

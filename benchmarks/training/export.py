"""Turns a training checkpoint into committed weights, and writes the card that says how they were trained."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from benchmarks import read_recipe
from common.checkpoints import read_plain, restore
from common.pretraining import Deployable


def from_checkpoint(path: Path, recipe: str) -> LightningModule:
    """The LightningModule of a recipe, with the arguments and weights of a checkpoint.

    ValueError: the checkpoint does not record its arguments.
    """
    checkpoint = read_plain(path)
    if "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} remembers no arguments; give a checkpoint that `lightning fit` wrote")
    return restore(training_class(read_recipe(recipe)), checkpoint)


def training_class(recipe: dict[str, Any]) -> type[LightningModule]:
    """The class that a recipe trains."""
    package, _, name = recipe["model"]["class_path"].rpartition(".")
    return getattr(import_module(package), name)


def save(module: Deployable, path: Path) -> None:
    """Write the trained model of a module, of a registered type, as fp16 safetensors."""
    model, clip = module.deployable()
    model.save(path, *([] if clip is None else [clip.architecture]), torch.float16)


def card(path: Path, result: dict[str, Any], attribution: str, target: str | None = None) -> str:
    """The Markdown card of committed weights. result: that of their run.

    attribution: the line about the images that they were trained on.
    target: the command that trains them again; None: retrain's.
    """
    run, target = result["conditions"], target or f"make retrain ONLY={result['name']}"
    tree = "clean tree" if run["clean"] else "tree with changes"
    lines = [
        f"# {path.name}",
        "",
        "| | |",
        "|---|---|",
        f"| command | `{result['command']}` (`{target}`) |",
        f"| seed | {run['seed']} |",
        f"| revision at the start | {run['revision']} ({tree}) |",
        f"| trained | {run['date']}, {result['minutes']:.0f} minutes on {run['device']}, "
        f"{run['threads']} threads, torch {run['torch']} |",
        f"| steps | {result['steps']:,} |",
        f"| file | fp16 safetensors, {path.stat().st_size / 1e6:.1f} MB |",
    ]
    for split in (name for name in ("val", "test") if name in result):
        for level, measured in result[split].items():
            lines.append(f"| {split}, {level} | {_measured(measured, result)} |")
    return "\n".join([*lines, "", attribution]) + "\n"


def _measured(measured: dict[str, Any], result: dict[str, Any]) -> str:
    """An accuracy with its interval, or a masked autoencoder's loss."""
    pictures = f"{measured['pictures']:,} pictures"
    if "loss" in measured:
        return f"mean squared error {measured['loss']:.3f} (1 with each patch's own mean), {pictures}"
    low, high = measured["interval"]
    accuracy = f"{100 * measured['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
    return f"{accuracy} of {pictures}, zero-shot among {result['names']:,} names"

"""From a training checkpoint to the weights that are committed, with a card that says whence they come."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule

from benchmarks import ROOT
from common.checkpoints import read_plain, restore
from common.data.embedded.module import ATTRIBUTION
from common.pretraining import Deployable


def from_checkpoint(path: Path, recipe: str) -> LightningModule:
    """The LightningModule that a recipe names, with a checkpoint's arguments and weights.

    ValueError: the checkpoint does not remember its arguments.
    """
    checkpoint = read_plain(path)
    if "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} remembers no arguments; give a checkpoint that `lightning fit` wrote")
    package, _, name = yaml.safe_load((ROOT / recipe).read_text())["model"]["class_path"].rpartition(".")
    return restore(getattr(import_module(package), name), checkpoint)


def save(module: Deployable, path: Path) -> None:
    """Write a module's trained model, of a registered type, as fp16 safetensors."""
    model, clip = module.deployable()
    model.save(path, *([] if clip is None else [clip.architecture]), torch.float16)


def card(path: Path, result: dict[str, Any], target: str | None = None, attribution: str | None = None) -> str:
    """The Markdown card of committed weights. result: what retrain writes of the run.

    target: the command that makes them again; None: retrain's.  attribution: of the pictures; None: the embedded ones.
    """
    stated, target = result["conditions"], target or f"make retrain ONLY={result['name']}"
    tree = "clean tree" if stated["clean"] else "tree with changes"
    lines = [
        f"# {path.name}",
        "",
        "| | |",
        "|---|---|",
        f"| command | `{result['command']}` (`{target}`) |",
        f"| seed | {stated['seed']} |",
        f"| revision at the start | {stated['revision']} ({tree}) |",
        f"| trained | {stated['date']}, {result['minutes']:.0f} minutes on {stated['device']}, "
        f"{stated['threads']} threads, torch {stated['torch']} |",
        f"| steps | {result['steps']:,} |",
        f"| file | fp16 safetensors, {path.stat().st_size / 1e6:.1f} MB |",
    ]
    for split in (name for name in ("val", "test") if name in result):
        for level, found in result[split].items():
            lines.append(f"| {split}, {level} | {_measured(found, result)} |")
    return "\n".join([*lines, "", attribution or ATTRIBUTION]) + "\n"


def _measured(found: dict[str, Any], result: dict[str, Any]) -> str:
    """An accuracy with its interval, or a masked autoencoder's loss."""
    pictures = f"{found['pictures']:,} pictures"
    if "loss" in found:
        return f"mean squared error {found['loss']:.3f} (1 with each patch's own mean), {pictures}"
    low, high = found["interval"]
    accuracy = f"{100 * found['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
    return f"{accuracy} of {pictures}, zero-shot among {result['names']:,} names"

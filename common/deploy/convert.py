"""`effclip convert`: a training checkpoint, or weights of this suite, as a self-contained model directory.

A checkpoint is read as tensors and plain values, so no code in it can run. The training that it names must be
registered in the entry-point group ``effclip.trainings``. A mistake in the command line is answered before torch is
imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import CommandParser, read_labels, read_templates
from common.paths import refuse_existing, written_whole

if TYPE_CHECKING:
    from torch import nn

    from common.deploy.calibration import Calibration

GROUP = "effclip.trainings"
"""The entry-point group that names the trainings whose checkpoints may be converted."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip convert", description=__doc__.splitlines()[0])
    add = command.add_argument
    add("checkpoint", metavar="CKPT", help="a .ckpt of `lightning fit`, or a weights file of this suite")
    add("folder", metavar="DIR", type=Path, help="the model directory, a new folder")
    add("--text-model", help="whose text tower to take, for a weights file of an image tower alone")
    add("--labels-file", help="the classes, one a line; default: those of the data that the checkpoint was trained on")
    add("--template", help="a prompt with {} for the class name, or a .txt file of such; default: the data's")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: a file cannot be read, or arguments do not go together."""
    args = parser().parse_args(arguments)
    names = read_labels(None, args.labels_file)
    templates = None if args.template is None else read_templates(args.template)
    source = Path(args.checkpoint)
    if source.is_dir():
        raise ValueError(f"{source.absolute()} is a folder; name the checkpoint or weights file in it")
    if not source.is_file():
        raise ValueError(f"no checkpoint at {source.absolute()}")
    refuse_existing(args.folder)
    from common import directory
    from common.deploy.card import write_card

    calibration = None
    if source.suffix == ".ckpt":
        if args.text_model is not None:
            raise ValueError("--text-model belongs to weights files; a checkpoint holds its text tower")
        model, texts, run = from_checkpoint(source)
    else:
        model, texts, run, calibration = _from_weights(source, args.text_model)
    recorded_names, recorded_templates = run.pop("class_names", None), run.pop("templates", None)
    with written_whole(args.folder) as folder:
        described = directory.write(
            folder, model, texts, names or recorded_names or (), templates or recorded_templates or (), run
        )
        if calibration is not None:  # it stays valid: the weights are the same in another file
            replace(calibration, weights=described.weights).write(folder / directory.CALIBRATION)
        write_card(folder, args.folder.resolve().name)
    print(f"{args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")
    return 0


def trainings() -> dict[str, importlib.metadata.EntryPoint]:
    """The trainings whose checkpoints may be converted, by class name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def from_checkpoint(path: Path) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    """The trained model of a checkpoint, the CLIP with its text tower, and the record of the run.

    The CLIP is None for a model that has a text tower.
    ValueError: the file is no plain checkpoint, or its training is not registered.
    """
    from common.checkpoint_io import first_non_finite
    from common.checkpoints import read_plain, restore, training_arguments

    contents = read_plain(path)
    is_checkpoint = isinstance(contents, dict) and {"state_dict", "global_step"} <= contents.keys()
    checkpoint = contents if is_checkpoint else {}
    name = str(checkpoint.get("hyper_parameters", {}).get("_class_path", "")).rpartition(".")[2]
    if name not in trainings():
        what = f"of {name}, which makes no model to use by itself" if name else "of no training that it names"
        raise ValueError(
            f"{path} is a checkpoint {what}; `lightning fit` writes what can be converted, from "
            f"{', '.join(sorted(trainings()))}"
        )
    wrong = first_non_finite(checkpoint["state_dict"])
    if wrong is not None:
        raise ValueError(f"{path} holds weights that are not finite ({wrong}); take an earlier checkpoint of the run")
    module = restore(trainings()[name].load(), checkpoint)
    record = next((state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("RunRecord")), {})
    run = {"training": name, "arguments": training_arguments(checkpoint), "steps": checkpoint["global_step"], **record}
    return *module.deployable(), run


def _from_weights(
    path: Path, text_model: str | None
) -> tuple[nn.Module, nn.Module | None, dict[str, Any], Calibration | None]:
    """The same for a weights file, and its calibration. The record of the run holds the card beside the file."""
    from common.deploy.model import load
    from common.weights import read_record

    deployed = load(path, text_model=text_model, device="cpu")
    loaded, texts, architecture = deployed.model, deployed.model.text_encoder(), read_record(path)["architecture"]
    if getattr(texts, "architecture", {}).get("vision_cfg") != architecture["vision_cfg"]:
        raise ValueError(f"{text_model} is no CLIP of this suite with the image tower that {path} was made of")
    card_file = path.with_suffix(".md")
    card = card_file.read_text() if card_file.is_file() else None
    run = {"weights": {path.name: loaded.weights["image"]}, "card": card}
    run |= {"class_names": deployed.class_names, "templates": list(deployed.templates)}
    return loaded.images, None if texts is loaded.images else texts, run, deployed.calibration

"""`effclip convert`: a training checkpoint, or weights of this suite, as a self-contained model directory.

Nothing of a checkpoint is run: it is read as tensors and plain values, and the training that it names must be one of
those registered in the entry-point group ``effclip.trainings``. torch is imported only after the command line was
found right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import read_labels, read_templates

if TYPE_CHECKING:
    from torch import nn

    from common.deploy.calibration import Calibration

GROUP = "effclip.trainings"
"""The entry-point group that names the trainings whose checkpoints may be converted."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip convert", description=__doc__.splitlines()[0])
    add = command.add_argument
    add("checkpoint", metavar="CKPT", help="a .ckpt of `lightning fit`, or a weights file of this suite")
    add("folder", metavar="DIR", type=Path, help="the model directory, a new folder")
    add("--text-model", help="whose text tower to take, for a weights file of an image tower alone")
    add("--labels-file", help="the classes, one a line; default: those of the data that the checkpoint was trained on")
    add("--template", help="a prompt with {} for the class name, or a .txt file of such; default: the data's")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError, for a user: what cannot be read or does not go together."""
    said = parser().parse_args(arguments)
    names = read_labels(None, said.labels_file)
    templates = None if said.template is None else read_templates(said.template)
    source = Path(said.checkpoint)
    if not source.is_file():
        raise ValueError(f"no checkpoint at {source.absolute()}")
    from common import directory
    from common.deploy.card import write_card

    calibration = None
    if source.suffix == ".ckpt":
        if said.text_model is not None:
            raise ValueError("--text-model belongs to weights files; a checkpoint holds its text tower")
        model, texts, run = from_checkpoint(source)
    else:
        model, texts, run, calibration = _from_weights(source, said.text_model)
    own_names, own_templates = run.pop("class_names", None), run.pop("templates", None)
    described = directory.write(
        said.folder, model, texts, names or own_names or (), templates or own_templates or (), run
    )
    if calibration is not None:  # the weights are the same in another file
        replace(calibration, weights=described.weights).write(said.folder / directory.CALIBRATION)
    write_card(said.folder)
    print(f"{said.folder}: {', '.join(sorted(path.name for path in said.folder.iterdir()))}")
    return 0


def trainings() -> dict[str, importlib.metadata.EntryPoint]:
    """The trainings whose checkpoints may be converted, by class name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def from_checkpoint(path: Path) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    """The trained model of a checkpoint, the CLIP whose texts it is read against, and what is known of the run.

    ValueError: no plain checkpoint, or of no registered training.
    """
    from common.checkpoints import read_plain, restore, training_arguments

    contents = read_plain(path)
    of_training = isinstance(contents, dict) and {"state_dict", "global_step"} <= contents.keys()
    checkpoint = contents if of_training else {}
    name = str(checkpoint.get("hyper_parameters", {}).get("_class_path", "")).rpartition(".")[2]
    if name not in trainings():
        what = f"of {name}, which makes no model to use by itself" if name else "of no training that it names"
        raise ValueError(
            f"{path} is a checkpoint {what}; `lightning fit` writes what can be converted, from "
            f"{', '.join(sorted(trainings()))}"
        )
    module = restore(trainings()[name].load(), checkpoint)
    record = next((state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("RunRecord")), {})
    run = {"training": name, "arguments": training_arguments(checkpoint), "steps": checkpoint["global_step"], **record}
    return *module.deployable(), run


def _from_weights(
    path: Path, text_model: str | None
) -> tuple[nn.Module, nn.Module | None, dict[str, Any], Calibration | None]:
    """The same from a weights file, and what was calibrated for it; known of the run is the card beside it."""
    from common.clip import read_record
    from common.deploy.model import load

    deployed = load(path, text_model=text_model, device="cpu")
    loaded, texts, own = deployed.model, deployed.model.text_encoder(), read_record(path)["architecture"]
    if getattr(texts, "architecture", {}).get("vision_cfg") != own["vision_cfg"]:
        raise ValueError(f"{text_model} is no CLIP of this suite with the image tower that {path} was made of")
    beside = path.with_suffix(".md")
    card = beside.read_text() if beside.is_file() else None
    run = {"weights": {path.name: loaded.weights["image"]}, "card": card}
    run |= {"class_names": deployed.class_names, "templates": list(deployed.templates)}
    return loaded.images, None if texts is loaded.images else texts, run, deployed.calibration


if __name__ == "__main__":
    sys.exit(main())

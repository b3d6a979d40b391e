"""Checkpoints: the one place that opens torch files and restores a training's module from a checkpoint.

A training's class attribute ``starts_from`` lists the arguments that only name initial weights, each with the value
that means "none": ``{"weights": None}``. Those files are not needed where the checkpoint holds all weights.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_LFS = b"version https://"
"""How the small file begins that Git LFS leaves in the place of a large one."""


def read_plain(path: str | Path) -> Any:
    """The tensors and plain values of a torch file, on the CPU. No code in the file runs.

    ValueError: there is no file, it holds more than plain values, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path.absolute()}")
    _refuse_other_kinds(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|type) ([\w.]+)", str(error))
        raise ValueError(
            f"{path} is no file of plain tensors and values, and opening it could run code "
            f"({named[1] if named else 'an unknown operation'}); save its state dict alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged, or no checkpoint ({reason}); copy or download it again") from error


def _refuse_other_kinds(path: Path) -> None:
    """ValueError: a file that torch.save did not write, by its first bytes, or that holds a program."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):
        what = f"begins with {start!r}" if start else "is empty"
        lfs = "; it only points to a file in Git LFS: fetch that by `git lfs pull`" if start == _LFS else ""
        mend = lfs or "; copy or download it again"
        raise ValueError(f"{path} is damaged, or no checkpoint: torch.save did not write it, it {what}{mend}")
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds a program; of OpenAI's models open_clip has the weights as "
            "data: give --weights openai (weights: openai in a recipe). Of any other, save the state dict"
        )


def training_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the training that wrote a checkpoint; {} where it recorded none."""
    recorded = checkpoint.get("hyper_parameters", {})
    return {name: value for name, value in recorded.items() if not name.startswith("_")}


def restore(training: type[LightningModule], checkpoint: dict[str, Any]) -> LightningModule:
    """The training's module, in evaluation mode, with a checkpoint's arguments and weights.

    Where the checkpoint holds all weights, the files of ``starts_from`` may be missing. Files that define the model,
    such as its architecture, must exist.
    ValueError: such a file is missing, or the weights do not fit.
    """
    # 1. Build without the files of initial weights.
    arguments = training_arguments(checkpoint)
    starts = getattr(training, "starts_from", {})
    module = _build(training, arguments | {name: value for name, value in starts.items() if name in arguments})
    # 2. The checkpoint holds only the trained part: the rest comes from those files.
    if module.state_dict().keys() - checkpoint["state_dict"].keys():
        module = _build(training, arguments)
        module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit {training.__name__}: {str(error)[:400]}") from error
    return module.eval()


def _build(training: type[LightningModule], arguments: dict[str, Any]) -> LightningModule:
    try:
        return training(**arguments)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint's {training.__name__} is built again with the files that its arguments name, relative "
            f"paths from the current folder: {error}"
        ) from error

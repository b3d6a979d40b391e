"""A model directory: everything that a deployed model needs in one folder, as data without code.

model.json          type, architecture with its vocabulary, class names, templates, hashes of the weights, the run
model.safetensors   the model, of a registered type
text.safetensors    its text side, where the model is an image tower alone
calibration.json    the result of `effclip calibrate`
README.md           the model card
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.conditions import digest
from common.paths import refuse_existing
from common.text_model import TextModel
from common.weights import read_record

DESCRIPTION, WEIGHTS, TEXT = "model.json", "model.safetensors", "text.safetensors"
CALIBRATION, CARD = "calibration.json", "README.md"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """The content of model.json.

    type: the registered name.  architecture: that of the model's CLIP, in open_clip's format.
    files: the hash of each weights file.
    class_names: those of the training data.  templates: those of the training data, or those that the texts were
        tuned for. Both are empty where the data has no classes.
    run: the record of the training; see ``RunRecord``.
    """

    type: str
    architecture: dict[str, Any]
    files: dict[str, str]
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, str]:
        """The hash of each side's weights, "image" and "text"."""
        return {"image": self.files[WEIGHTS], "text": self.files.get(TEXT, self.files[WEIGHTS])}


def is_directory(path: Path) -> bool:
    """Whether a folder is a model directory."""
    return (path / DESCRIPTION).is_file()


def write(
    folder: Path,
    model: nn.Module,
    texts: nn.Module | None,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    run: dict[str, Any] | None = None,
) -> Description:
    """Write weights and description of a model into a new or empty folder.

    model: of a registered type.  texts: for an image tower alone, the CLIP that gives the text tower.
    ValueError: the folder is not empty.
    """
    refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if texts is None:
        model.save(folder / WEIGHTS, torch.float32)
    else:
        model.save(folder / WEIGHTS, texts.architecture, torch.float32)
        (texts if isinstance(texts, TextModel) else TextModel.of(texts)).save(folder / TEXT)
    record = read_record(folder / WEIGHTS)
    kinds = sorted(record.keys() - {"architecture"})
    described = Description(
        kinds[0] if kinds else "CLIP",
        record["architecture"],
        {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))},
        list(class_names),
        list(templates),
        run or {},
    )
    text = json.dumps({"format": _FORMAT, **asdict(described)}, indent=1, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n")
    return described


def read(folder: Path) -> Description:
    """Read the description of a model directory and check it against the weights files.

    ValueError: it is no model directory, its format is newer, or a weights file is missing or different.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder.absolute()} has no {DESCRIPTION}; `effclip convert` makes a model directory")
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("format")
        described = Description(**fields) if version == _FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a model ({error}); convert it again") from error
    if described is None:
        raise ValueError(f"{path} has format {version!r}, this version reads {_FORMAT}; install a newer one")
    for name, expected in described.files.items():
        file = folder / Path(name).name
        if not file.is_file() or digest(file) != expected:
            state = "is not the file that model.json describes" if file.is_file() else "is missing"
            raise ValueError(f"{file} {state}; convert the model again")
    if WEIGHTS not in described.files or read_record(folder / WEIGHTS).get("architecture") != described.architecture:
        raise ValueError(f"{path} states another architecture than {WEIGHTS}; convert the model again")
    return described

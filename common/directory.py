"""A model directory: all that a deployed model needs in one folder, as data and never as code.

model.json          type, architecture with its vocabulary, class names, templates, hashes of the weights, the run
model.safetensors   the model, of a registered type
text.safetensors    its text side, where the model is an image tower alone
calibration.json    what `effclip calibrate` found
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

from common.clip import read_record
from common.conditions import digest
from common.text_model import TextModel

DESCRIPTION, WEIGHTS, TEXT = "model.json", "model.safetensors", "text.safetensors"
CALIBRATION, CARD = "calibration.json", "README.md"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What model.json says.

    type: the registered name.  architecture: of the CLIP that the model belongs to, in open_clip's format.
    class_names, templates: of the data it was trained on, or the templates that its texts were tuned for; empty where
        the data has no classes.
    files: the hash of each weights file.  run: what the training recorded of itself; see ``RunRecord``.
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

    model: of a registered type.  texts: the CLIP whose text side it is read against, for an image tower alone.
    ValueError: the folder has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder.absolute()} is there already; name a new folder")
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
    """The description of a model directory, found to fit the weights beside it.

    ValueError: not a model directory, of a newer format, or with weights that are missing or others.
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

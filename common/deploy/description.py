"""export.json: what an exported folder says of itself, checked before anything runs by it. No torch here."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXPORT_VERSION = 1
"""The version of export.json that one model has."""
CASCADE_VERSION = 2
"""The version that a cascade has, so that code which knows none refuses it."""

_ENTRIES = ("calibration", "class_names", "gate", "gmacs", "setting", "stages", "templates")
"""What every run reads in export.json."""
_OF_A_MODEL = ("embed_dim", "logit_scale", "model", "preprocess", "text")
"""What it reads of each model: in export.json itself, or of a cascade in each of its "members"."""


def description(folder: Path) -> dict[str, Any]:
    """The export.json of a folder. ValueError: there is none, or it is damaged or of another version."""
    file = folder / "export.json"
    if not file.is_file():
        raise ValueError(f"{folder.absolute()} has no export.json; `effclip export MODEL --format onnx` writes one")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); export it anew") from error
    if not isinstance(about, dict):
        raise ValueError(f"{file} is damaged (no object); export it anew")
    version = about.get("version")
    if version not in (EXPORT_VERSION, CASCADE_VERSION) or about.get("format") != "onnx":
        raise ValueError(
            f"{file} is of format {about.get('format')} in version {version}, and this code reads onnx in version "
            f"{EXPORT_VERSION} or {CASCADE_VERSION}; export it anew"
        )
    parts = [about] if version == EXPORT_VERSION else about.get("members")
    parts = parts if parts and _are(dict, parts) else [{}]
    lacking = [name for name in _ENTRIES if name not in about]
    lacking += [name for name in _OF_A_MODEL if any(name not in part for part in parts)]
    if lacking:
        raise ValueError(f"{file} is damaged (without {', '.join(lacking)}); export it anew")
    for name, holds in _HOLDS.items():
        for owner in parts if name in _OF_A_MODEL else [about]:
            if not _fulfilled(holds, owner):
                raise ValueError(f"{file} is damaged ({name} is {reprlib.repr(owner.get(name))}); export it anew")
    return about


def _fulfilled(holds: Callable[[dict[str, Any]], bool], owner: dict[str, Any]) -> bool:
    try:
        return holds(owner)
    except (AttributeError, KeyError, TypeError):  # a part is lacking, or of another kind
        return False


def _are(kind: type, values: Any, count: int | None = None) -> bool:
    """Whether it is a list of such values. count: of so many."""
    return isinstance(values, list) and all(isinstance(v, kind) for v in values) and count in (None, len(values))


def _chained(about: dict[str, Any]) -> bool:
    """Whether each model has a level, and each level reads its picture, or all that the level before it kept."""
    before: dict[str, Any] = {}
    for stage in about["stages"]:
        goes_on = before and stage.get("member") == before.get("member")
        count = len(before["outputs"]) - 1 if goes_on else 1  # the first output is the embedding
        if not (isinstance(stage["file"], str) and _are(str, stage["inputs"], count) and _are(str, stage["outputs"])):
            return False
        before = stage
    models = len(about["members"]) if about["version"] == CASCADE_VERSION else 1
    return {stage.get("member", 0) for stage in about["stages"]} == set(range(models))


_NUMBER = int | float
_HOLDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "stages": _chained,
    "gmacs": lambda about: about["gmacs"] is None or _are(_NUMBER, about["gmacs"], len(about["stages"])),
    "class_names": lambda about: _are(str, about["class_names"]),
    "templates": lambda about: _are(str, about["templates"]),
    "setting": lambda about: isinstance(about["setting"], dict),
    "gate": lambda about: about["gate"] is None or isinstance(about["gate"]["threshold"], _NUMBER | None),
    "calibration": lambda about: (
        about["calibration"] is None
        or (
            _are(_NUMBER, [about["calibration"]["point"][name] for name in ("setting", "gmacs", "accuracy")])
            and all(_are(_NUMBER, point, 3) for point in about["calibration"]["curve"])
        )
    ),
    "keep_rates": lambda about: all(
        isinstance(entry["keep"], _NUMBER)
        and isinstance(entry["file"], str)
        and (entry["gmacs"] is None or _are(_NUMBER, entry["gmacs"], 1))
        for entry in about.get("keep_rates", ())
    ),
    "embed_dim": lambda model: isinstance(model["embed_dim"], int),
    "logit_scale": lambda model: isinstance(model["logit_scale"], _NUMBER),
    "preprocess": lambda model: (
        _are(int, [model["preprocess"][name] for name in ("size", "fill_color")])
        and _are(str, [model["preprocess"][name] for name in ("interpolation", "resize_mode")])
        and all(_are(_NUMBER, model["preprocess"][name], 3) for name in ("mean", "std"))
    ),
    "text": lambda model: (
        model["text"] is None
        or (
            _are(str, [model["text"][name] for name in ("file", "tokenizer")])
            and isinstance(model["text"]["tokens"], int | None)
            and isinstance(model["text"]["words"], dict)
        )
    ),
}
"""What the value of each entry fulfils, of export.json or of a model; the stages first, which others count."""

"""Weights files: safetensors with a record of what they hold, and the state dicts of other programs.

A state dict is returned in open_clip's names, whichever program wrote it (``common.layouts``). A path is looked up as
that of a recipe is: in the working directory, then in the installed packages (``benchmarks/weights/FILE``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoints import read_plain
from common.layouts import open_clip_names
from common.recipes import packaged_file

_Model = TypeVar("_Model", bound=nn.Module)


def save_model(module: nn.Module, path: str | Path, record: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a module's weights as safetensors of one dtype, with ``record`` as JSON in the file's metadata."""
    save_state(module.state_dict(), path, record, dtype)


def save_state(state: Mapping[str, Tensor], path: str | Path, record: dict[str, Any], dtype: torch.dtype) -> None:
    """The same for a state dict."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().to("cpu", dtype).contiguous().clone() for key, value in state.items()}
    path.touch()  # with the rights that the umask gives, where safetensors lets only the owner read
    mode = path.stat().st_mode
    save_file(stored, str(path), metadata={key: json.dumps(value) for key, value in record.items()})
    path.chmod(mode)


def load_saved(path: str | Path, sections: set[str], problem: str, build: Callable[[dict[str, Any]], _Model]) -> _Model:
    """Build a model from the record of a file that ``save_model`` wrote, and load the file's weights.

    sections: those that the record must have.  build: record -> the model, with any weights.
    ValueError: a section is missing (the message is the path and ``problem``), or the weights do not fit.
    """
    record = read_record(path)
    if not sections <= record.keys():
        raise ValueError(f"{path} {problem}")
    model = build(record)
    load_state(model, read_state_dict(path), str(path))
    return model


def load_state(
    module: nn.Module, state: dict[str, Tensor], source: str, architecture: str = "this architecture"
) -> None:
    """Load a complete state dict. ValueError names the keys that do not fit.

    source, architecture: the names of the weights and of the module in an error.
    """
    expected = module.state_dict()
    wrong = [f"missing {key}" for key in expected.keys() - state.keys()]
    wrong += [f"unknown {key}" for key in state.keys() - expected.keys()]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{source} does not fit {architecture}: {'; '.join(sorted(wrong)[:4])}{more}")
    module.load_state_dict(state)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a safetensors file's metadata, as JSON objects by section; {} for a file without one.

    The section "architecture" is a CLIP's; a model of another registered type adds a section named after the type.
    ValueError: there is no file, or it or its record is damaged.
    """
    path = packaged_file(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path.absolute()}")
    if path.suffix != ".safetensors":
        return {}
    with _opened(path) as file:
        metadata = file.metadata() or {}
    # Other programs write plain words there ("format": "pt"), which are not part of the record.
    try:
        return {key: json.loads(value) for key, value in metadata.items() if value.startswith("{")}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a damaged record ({error}); copy, download or convert it again") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights of a safetensors or torch file as fp32, see ``open_clip_names``; no code in the file is run.

    A state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is taken out.
    ValueError: there is no file, it is damaged, or it holds something else than a state dict.
    """
    path = packaged_file(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path.absolute()}")
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        state = read_plain(path)
        while isinstance(state, dict) and (inner := state.get("state_dict", state.get("model"))) is not None:
            state = inner
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, names with their tensors; save model.state_dict() alone")
    return {key: value.float() if value.is_floating_point() else value for key, value in open_clip_names(state).items()}


def _opened(path: str | Path) -> safe_open:
    """A safetensors file. ValueError: it is another kind of file, or incomplete."""
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); copy or download it again, or name it .pt if torch.save "
            "wrote it"
        ) from error

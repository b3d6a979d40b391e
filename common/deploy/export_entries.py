"""The entries of export.json about models, levels, classes and costs.

One model's preprocessing, joint space, scale and text tower stand at the top of it; those of a cascade's models stand
in "members", and each stage says whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.adaptive import path_costs
from common.data.images import ORIENTATION
from common.deploy.description import CASCADE_VERSION, EXPORT_VERSION

if TYPE_CHECKING:
    from common.deploy.model import Deployed
    from common.stages import Stage


def model_entries(deployed: Deployed, form: str, stages: Sequence[Stage], files: Sequence[Path]) -> dict[str, Any]:
    """What the graphs are, and what a picture costs at each level."""
    cascade = deployed.first is not None
    entries = [
        {"file": file.name, "inputs": stage.inputs, "outputs": stage.outputs} | ({"member": place} if cascade else {})
        for place, (stage, file) in enumerate(zip(stages, files, strict=True))
    ]
    return {
        "version": CASCADE_VERSION if cascade else EXPORT_VERSION,
        "model": deployed.name,
        "type": "cascade" if cascade else deployed.model.type,
        "format": form,
        "dtype": "fp32",
        "stages": entries,
        "gmacs": _cascade_costs(deployed) if cascade else _costs(stages, deployed.model.image_size),
    }


def classification_entries(
    deployed: Deployed, setting: float | None, names: Sequence[str], templates: Sequence[str], folder: Path
) -> dict[str, Any]:
    """How embeddings become answers: each model's part, gate and calibration. Class embeddings are written."""
    has_levels = deployed.setting_name == "threshold"
    calibration = deployed.calibration if deployed.setting_name else None
    if deployed.first is None:
        entries = _member(deployed, names, templates, folder / "classes.npy")
    else:
        files = [folder / f"classes_{place}.npy" for place in range(len(deployed.members))]
        entries = {
            "members": [
                {"model": member.name, "type": member.model.type, "classes": file.name}
                | _member(member, names, templates, file)
                for member, file in zip(deployed.members, files, strict=True)
            ]
        }
    return {
        **entries,
        "setting": {deployed.setting_name: setting} if deployed.setting_name else {},
        "class_names": list(names),
        "templates": list(templates),
        "gate": gate(setting) if has_levels else None,
        "calibration": None if calibration is None else asdict(calibration),
        "calibrated_on_these_classes": bool(
            calibration and names and calibration.prompts == deployed.prompts_hash(names, templates)
        ),
    }


def _member(member: Deployed, names: Sequence[str], templates: Sequence[str], file: Path) -> dict[str, Any]:
    """A model's pictures, joint space and scale; the embeddings of its classes are written."""
    if names:
        np.save(file, member.classes(names, templates).float().cpu().numpy(), allow_pickle=False)
    return {
        "preprocess": {**asdict(member.model.preprocess), "orientation": ORIENTATION},
        "embed_dim": _embed_dim(member),
        "logit_scale": member.scale.item(),
    }


def gate(threshold: float | None) -> dict[str, Any]:
    """A threshold that no margin reaches is None: every picture goes through all levels."""
    return {"confidence": "margin", "threshold": None if threshold is None or threshold > 1 else threshold}


def _embed_dim(deployed: Deployed) -> int:
    import torch

    size = deployed.model.image_size
    with torch.no_grad():
        return deployed.model.images.encode_image(torch.zeros(1, 3, size, size)).shape[-1]


def _costs(stages: Sequence[Stage], image_size: int) -> list[float] | None:
    """GMACs of one picture that exits after each stage; None where an operation has no known cost."""
    try:
        return [macs.gmacs for macs in path_costs(stages, image_size)]
    except ValueError:
        return None


def _cascade_costs(deployed: Deployed) -> list[float] | None:
    try:
        return deployed.costs
    except ValueError:
        return None


def keep_rate_entries(
    deployed: Deployed, stages: Sequence[Stage], others: Mapping[float, Stage], files: Sequence[Path]
) -> list[dict[str, Any]]:
    """File and GMACs of every keep rate, ascending; empty where there is one graph alone."""
    if not others:
        return []
    by_rate = {deployed.setting(): stages[0], **others}
    entries = [
        {"keep": rate, "file": file.name, "gmacs": _costs([stage], deployed.model.image_size)}
        for (rate, stage), file in zip(by_rate.items(), files, strict=True)
    ]
    return sorted(entries, key=lambda entry: entry["keep"])

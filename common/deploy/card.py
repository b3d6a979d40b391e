"""The model card of a model directory, written from the directory's description."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from common.deploy.model import Deployed, load
from common.directory import CARD, Description, read


def write_card(folder: Path, name: str) -> None:
    """Write README.md of a model directory, which users will know by ``name``."""
    (folder / CARD).write_text(card(read(folder), load(folder, device="cpu"), name))


def card(described: Description, deployed: Deployed, name: str) -> str:
    """The text of the card: type, cost, training, licence and attribution, use."""
    run, vision = described.run, described.architecture["vision_cfg"]
    vocabulary = described.architecture["text_cfg"].get("vocabulary")
    rows = {
        "type": described.type,
        "pictures": f"{vision['image_size']} px, patch {vision['patch_size']}, width {vision['width']}, "
        f"{vision['layers']} layers{_prepared(described)}",
        "text": f"vocabulary of {len(vocabulary):,} ids, other words are refused" if vocabulary else "whole vocabulary",
        "classes": f"{len(described.class_names):,} names, in model.json" if described.class_names else "no own",
        "cost": _cost(deployed),
        **_training(run),
        "weights": ", ".join(f"{name} {digest}" for name, digest in described.files.items()),
    }
    lines = [f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "## Licence and attribution", "", *licence(run), "", "## Use", "", "```bash"]
    lines += [f"effclip classify PICTURES --model {shlex.quote(name)}", "```", ""]
    if run.get("card"):
        lines += ["## The card of the weights it was made from", "", run["card"].strip(), ""]
    return "\n".join(lines)


def _prepared(described: Description) -> str:
    """How pictures are prepared, where it is not as for OpenAI's CLIP."""
    settings = described.architecture.get("preprocess_cfg", {})
    return "".join(f"; {name} {value}" for name, value in settings.items())


def _cost(deployed: Deployed) -> str:
    try:
        costs = deployed.costs
    except ValueError as error:
        return f"not counted: {error}"
    paths = "one path" if len(costs) == 1 else {"threshold": "by level", "keep": "by keep rate"}[deployed.setting_name]
    return f"{', '.join(f'{cost:.4g}' for cost in costs)} GMACs a picture, image tower, {paths}"


def _training(run: dict[str, Any]) -> dict[str, str]:
    """The rows about the run; a missing entry is "not recorded"."""
    if "training" not in run:
        return {"training": "not recorded; see below" if run.get("card") else "not recorded"}
    data, conditions = run.get("data") or {}, run.get("conditions") or {}
    tree = {True: "clean tree", False: "tree with changes", None: "tree not known"}[conditions.get("clean")]
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in (run.get("metrics") or {}).items())
    arguments = ", ".join(f"{name} {value}" for name, value in run["arguments"].items())
    return {
        "training": f"{run['training']} ({arguments})",
        "data": f"{data['class_path']} {data.get('init_args') or ''}".strip() if data else "not recorded",
        "seed": str(run.get("seed", "not recorded")),
        "steps": f"{run['steps']:,}",
        "metrics": metrics or "none recorded",
        "revision at the start": f"{conditions['revision']} ({tree})" if conditions.get("revision") else "not recorded",
        "trained": "{date}, {device}, torch {torch}".format(**conditions) if conditions else "not recorded",
    }


def licence(run: dict[str, Any]) -> list[str]:
    """The lines of a card about licence and attribution, from the record of a training."""
    initial_weights = run.get("arguments", {}).get("weights")
    sentences = ["The code that made and runs this model is under the MIT licence."]
    if initial_weights:
        sentences.append(f"It began with weights from {initial_weights}: their licence goes with it.")
    if run.get("attribution"):
        return [*sentences, "", run["attribution"]]
    if run.get("card"):
        return [*sentences, "Whose data it was trained on is said by the card below."]
    return [*sentences, "Whose data it was trained on was not recorded: say so here before you hand the model on."]

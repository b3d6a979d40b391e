"""The reference ladder of the embedded benchmark: how many names colours alone tell, beside what the teacher tells.

All numbers are val's: revision 2's test pictures wait for its trained models (benchmarks/protocol.md).

Shapes: M pictures, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import RESULTS, WEIGHTS, cells
from benchmarks.embedded import REVISION, TEACHER, first_pictures
from benchmarks.together.reference_ladder import (
    BINS,
    FULL,
    FULL_IN_GREY,
    HALF,
    ROWS,
    TRAINED_ON,
    WIDTH,
    cell,
    grey,
    measured,
    named_right,
    without_training,
)
from common.conditions import conditions, digest
from common.data.embedded.module import SPLITS, VIEW, prompt, scenes_of
from common.models import load_model


class Tower(NamedTuple):
    """A CLIP on the ladder: its row, weights, the command that trains it, and whether it sees pictures in grey."""

    row: str
    weights: Path
    command: str
    in_grey: bool = False


_SHAPES = WEIGHTS / "shapes_clip.safetensors", "lightning fit -c common/shapes_clip.yaml"
_SHAPES_HALF = WEIGHTS / "shapes_clip_half.safetensors", "lightning fit -c common/shapes_clip_half.yaml"
_TEXTURES = WEIGHTS / "textures_clip.safetensors", "python -m benchmarks mlip-shapes-runs --only texture-clip-0"
_TEACHER = TEACHER, "make retrain ONLY=teacher"
TOWERS = {
    1: (Tower(FULL, *_TEACHER), Tower(FULL_IN_GREY, *_TEACHER, in_grey=True)),
    2: (Tower(HALF, *_SHAPES_HALF), Tower(FULL, *_SHAPES), Tower(FULL_IN_GREY, *_SHAPES, in_grey=True)),
    3: (Tower(FULL, *_TEXTURES), Tower(FULL_IN_GREY, *_TEXTURES, in_grey=True)),
}
"""The CLIPs by revision, measured as soon as their weights are there.

Revision 3's is a row of MLIP's experiment, with seed 0 (``benchmarks.mlip.shapes_runs``).
"""
_PLAIN = "Revision 3's CLIP, in the rows of teachers, is the plain CLIP of MLIP's experiment and teaches nothing. "


def run(smoke: bool = False) -> dict[str, Any]:
    """The ladders of all revisions on val. smoke: few pictures."""
    trained_on = 300 if smoke else TRAINED_ON
    weights = {tower.weights for towers in TOWERS.values() for tower in towers if tower.weights.is_file()}
    run_conditions = conditions(
        "embedded",
        seeds=1,
        dtype="float32",
        weights={path.name: digest(path) for path in sorted(weights)},
        trained_on=trained_on,
        reported_on="val",
    )
    ladders = [ladder(revision, 100 if smoke else SPLITS[revision]["val"][0], trained_on) for revision in TOWERS]
    return {"name": "embedded-reference", "conditions": run_conditions, "ladders": ladders}


def ladder(revision: int, count: int, trained_on: int) -> dict[str, Any]:
    """The rows of a revision, measured on the first ``count`` pictures of val; a CLIP without weights has a command."""
    names = scenes_of(revision).class_names("seen")
    shown, labels = first_pictures("val", count, revision)
    known = first_pictures("train", trained_on, revision)
    rows = without_training(len(names), known, (shown, labels))
    for tower in TOWERS[revision]:
        if not tower.weights.is_file():
            rows.append({"row": tower.row, "command": tower.command})
            continue
        model = load_model(str(tower.weights))
        clip, size = model.text_encoder(), model.image_size
        seen = shown if size == VIEW else first_pictures("val", count, revision, size)[0]
        seen = [grey(picture) for picture in seen] if tower.in_grey else seen
        rows.append(measured(tower.row, [named_right(clip, seen, labels, [prompt(name) for name in names])]))
    return {"revision": revision, "names": len(names), "pictures": count, "rows": rows}


def sentence() -> str:
    """The stored ladder of scenes of shape in one sentence, for the tables of models on them."""
    stored = json.loads((RESULTS / "embedded-reference.json").read_text())
    (block,) = (block for block in stored["ladders"] if block["revision"] == REVISION)
    rungs = "; ".join(f"{row['row']} {100 * row['accuracy']:.1f}" for row in block["rows"] if "accuracy" in row)
    return f"Reference ladder of scenes of shape, % of val (`make reproduce-embedded-reference`): {rungs}."


def missing(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The rows that were not run, with the command that trains their model."""
    for block in result["ladders"]:
        for row in block["rows"]:
            if "command" in row:
                yield f"revision {block['revision']}: {row['row']}", row["command"]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    ladders, run_conditions = result["ladders"], result["conditions"]
    columns = [{row["row"]: cell(row) for row in block["rows"]} for block in ladders]
    head = ["top-1 on val, % [95 %]", *(f"revision {block['revision']}, {block['names']} names" for block in ladders)]
    lines = cells.table(head, [[row, *(column.get(row, "–") for column in columns)] for row in ROWS])
    third = any(FULL in column for block, column in zip(ladders, columns, strict=True) if block["revision"] == 3)
    counts = ", ".join(f"{block['pictures']:,}" for block in ladders)
    note = (
        f"Embedded scale. These are numbers of val ({counts} pictures); nothing here reads test. Each histogram has "
        f"{BINS} bins; its MLP with {WIDTH} hidden units learned from {run_conditions['trained_on']:,} labelled "
        "pictures of train. A CLIP is zero-shot. Of the pictures that revision 2's CLIPs learned from, a fifth was in "
        f"grey; other models saw none. {_PLAIN if third else ''}Intervals resample the pictures; there is one "
        "training seed, so they leave the spread between trainings out. "
        f"{run_conditions['dtype']} on {run_conditions['device']}, torch {run_conditions['torch']}."
    )
    return {"md": f"{lines}\n\n{note}\n", "figures": {}}

"""Pretraining on fewer patches: FLIP and A-CLIP on scenes of shape, each beside a CLIP that sees every patch.

Shapes: S training seeds, M pictures.

Every model is evaluated on whole pictures of test, and the answers that its training left are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks import read_log
from benchmarks.cells import Result, accuracy, missing_runs, points, table
from benchmarks.embedded import LOGGED, REVISION, heads_beyond
from benchmarks.statistics import RESAMPLES, difference, mean_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.training import shapes
from common.conditions import conditions


class Line(NamedTuple):
    """A row: its name, the family of its trainings, its control's (empty: it is one), and what a step shows it."""

    name: str
    family: str
    control: str
    sees: str


LINES = (
    Line("CLIP, classes and captions", "shapes-teacher", "", "36 patches"),
    Line("FLIP without its unmasked tuning", "shapes-flip", "shapes-teacher", "18 random patches"),
    Line("CLIP, captions alone", "shapes-captions", "", "36 patches"),
    Line("A-CLIP", "shapes-aclip", "shapes-captions", "two views of 20 patches; its slow copy all of both"),
)
COMMAND = "make retrain ONLY='{}-*'"
MEASURED = ("test", "unseen", "retrieval")
"""Splits of the trained names, of held-out ones, and of pictures among whose captions their own is to be found."""


def run(smoke: bool = False) -> dict[str, Any]:
    """The rows whose trainings are finished. smoke: few resamples."""
    known = shapes.finished((*shapes.FAMILIES, *shapes.FEWER_PATCHES))
    resamples = 20 if smoke else RESAMPLES
    rows = []
    for line in LINES:
        right = {split: _right(known, line.family, split) for split in MEASURED} if line.family in known else {}
        row = {"row": line.name, "sees": line.sees, "seeds": len(right.get("test", ())), "difference": None}
        row |= {split: mean_interval(values, resamples).ends for split, values in right.items()}
        if right and line.control in known:
            paired = known[line.family]["test"].keys() == known[line.control]["test"].keys()
            against = _right(known, line.control, "test")
            row["difference"] = difference(right["test"], against, paired, resamples).ends
        rows.append(row)
    setting = conditions(
        "embedded",
        seeds=len(shapes.SEEDS),
        reported_on="test",
        reads_of_test=read_log.reads_of_all(LOGGED[REVISION]),
    )
    return {"name": "fewer-patches", "conditions": setting, "steps": shapes.STEPS, "rows": rows}


def _right(known: shapes.Known, family: str, split: str) -> np.ndarray:
    """Right answers, bool [S,M]."""
    return np.stack([part.last for part in known[family][split].values()])


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    lines = []
    for line, row in zip(LINES, result["rows"], strict=True):
        measured = [accuracy(row[split][0], row[split][1:]) if split in row else "not run" for split in MEASURED]
        lines.append([line.name, row["sees"], row["seeds"], *measured, points(row["difference"])])
    head = ["pretraining", "a step sees", "seeds", "accuracy [95 %]", *heads_beyond()]
    text = table([*head, "less the CLIP above"], lines, left=(0, 1))
    note = (
        f"Zero-shot on scenes of shape, in %, whole pictures for all. Each row trains {result['steps']:,} steps of one "
        "batch size from random weights, so FLIP does less work a step than the CLIP above it, and A-CLIP, with two "
        "views and a slow copy, more. FLIP learns from classes and captions as the CLIP above it. Its paper then tunes "
        "on whole pictures for a few steps (patchrank/flip_unmasked.yaml), which is not done here, so the row is no "
        "measure of FLIP as published. A-CLIP has no classes, and views of its own beside SimCLR and BYOL. Intervals "
        "resample training seeds and pictures; a row of one seed leaves the spread of trainings out, and no headline "
        f"rests on it.{read_log.remark(result['conditions'])}"
    )
    return {"md": f"{text}\n\n{sentence()}\n\n{note}\n", "figures": {}}


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings that are not finished."""
    for line, row in zip(LINES, result["rows"], strict=True):
        yield from missing_runs([(line.name, row["seeds"], len(shapes.SEEDS))], COMMAND.format(line.family))

"""Trains the embedded models again, each by its recipe: `python -m benchmarks retrain` (`--list`: the runs).

``benchmarks.training.run`` describes what a run leaves behind, and how it continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, cells, read_recipe
from benchmarks.embedded import PART, TEACHER, batches, prompts, right_answers
from benchmarks.statistics import mean_interval
from benchmarks.training import shapes
from benchmarks.training.run import STORED, Evaluation, Run, announce, command, folder_of, is_finished, train
from benchmarks.waveclip import answers
from common.models import load_model

FIRST = Run("teacher", "common/embedded_clip.yaml", 26, output=TEACHER)
"""That of revision 1, whose reference ladder shows why the revision left."""
RUNS = (FIRST, *shapes.RUNS)


def chosen(only: str | None) -> list[Run]:
    """The runs whose name fits a pattern such as ``shapes-*``, or all runs. ValueError: no name fits."""
    runs = [run for run in RUNS if fnmatchcase(run.name, only or "*")]
    if not runs:
        raise ValueError(f"ONLY={only} is no run; there are {', '.join(run.name for run in RUNS)}")
    return runs


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished. ONLY=NAME: that run, or ONLY='shapes-*': those; CONFIG=FILE: an overlay on recipes.

    A run is finished when its result is in its run folder, or when its result and weights are committed. ONLY=NAME
    without a wildcard asks for a committed run anew. With an overlay, weights and results stay in run folders of
    their own. A smoke run lists.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks retrain", description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores (LIST=1)")
    listing = parser.parse_args(arguments).list or any(os.environ.get(name) for name in ("LIST", "SMOKE"))
    overlay = os.environ.get("CONFIG") or None
    if overlay and not Path(overlay).is_file():
        raise ValueError(f"CONFIG={overlay}: no file at {Path(overlay).absolute()}")
    only, planned = os.environ.get("ONLY"), []
    for run in chosen(only):
        finished = is_finished(run, overlay, committed=run.name != only)
        announce(run, finished, overlay)
        if finished:
            continue
        planned.append(run.minutes)
        if not listing:
            check_start(run)
            train(run, folder_of(run, overlay), _evaluation(run, overlay), overlay)
    if listing:
        print(
            f"{len(planned)} not finished: planned for {sum(planned) / 60:.1f} hours on 2 cores; a processor that "
            "emulates bfloat16 takes longer"
        )
    return 0


def check_start(run: Run) -> None:
    """ValueError: a run starts from weights of another run which are not there."""
    settings = {**read_recipe(run.recipe)["model"]["init_args"], **run.settings.get("model", {})}
    for maker in (run for run in RUNS if run.output):
        name = str(maker.output.relative_to(ROOT))
        if name in settings.values() and not maker.output.is_file():
            raise ValueError(
                f"{run.name} starts from {name}, which is not there; `make retrain ONLY={maker.name}` makes it"
            )


def _evaluation(run: Run, overlay: str | None) -> Evaluation:
    """How a run's weights are evaluated."""
    if run not in shapes.RUNS:
        return evaluate
    return partial(shapes.evaluate, output=None if overlay else shapes.file(run.name), changes=run.settings)


def evaluate(
    weights: Path, recipe: str, splits: Sequence[str] = ("val", "test"), count: int | None = None
) -> dict[str, Any]:
    """Zero-shot accuracy of a CLIP on some splits of revision 1: {"names": C, split: {"top1": ...}}.

    "first" counts the right answers on the first PART pictures, for a check that need not see all of them.
    recipe: of the training; it holds the image size.
    count: how many of the first images of a split, a multiple of 250; None: all.
    """
    size = read_recipe(recipe)["data"]["init_args"].get("image_size")
    clip, texts = load_model(str(weights)).text_encoder(), prompts(revision=1)
    result: dict[str, Any] = {"names": len(texts)}
    with torch.no_grad():
        for split in splits:
            right = right_answers(clip, batches(split, count, size, revision=1), texts)
            counts = {"pictures": len(right), "first": int(right[:PART].sum())}
            result[split] = {"top1": {**cells.accuracy_of(right), **counts}}
    return result


def results() -> dict[str, dict[str, Any]]:
    """The stored result of every finished run, by name."""
    paths = {run.name: STORED / f"{run.name}.json" for run in RUNS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def table() -> str:
    """All runs as a Markdown table, with the command of those that were not run; a line for the seeds of a family."""
    known, rows = results(), []
    if first := known.get(FIRST.name):
        top1 = first["test"]["top1"]
        accuracy = cells.accuracy(top1["accuracy"], top1["interval"])
        rows.append([FIRST.name, f"{first['minutes']:.0f}", "–", accuracy, f"`{shlex.join(command(FIRST))}`"])
    else:
        rows.append([FIRST.name, "–", "not run", "not run", f"`make retrain ONLY={FIRST.name}`"])
    for name, runs in (*shapes.FAMILIES, *shapes.FEWER_PATCHES):
        finished = [run.name for run in runs if run.name in known]
        rows.append(_family(name, finished, [known[run]["minutes"] for run in finished]))
    head = ["run", "minutes", "coarse, test [95 %]", "fine, test [95 %]", "command"]
    runs = cells.table(head, rows, left=(0, 4))
    first, shape = (len(prompts(revision)) for revision in (1, 2))
    note = (
        f"Top-1; a CLIP has one level. Intervals resample seeds and pictures. The runs named shapes tell {shape} names "
        f"apart, on scenes of shape. The teacher is revision 1's, of {first} names; its reference ladder shows why the "
        "revision left."
    )
    return f"{runs}\n\n{note}\n"


def _family(name: str, finished: Sequence[str], minutes: Sequence[float]) -> list[str]:
    """A family's line: the minutes of a run, the mean accuracy over its finished seeds, and the command of all."""
    line = f"`make retrain ONLY='{name}-*'`"
    title = f"{name}, {len(finished)} of {len(shapes.SEEDS)} seeds"
    if not finished:
        return [title, "–", "not run", "not run", line]
    right = np.stack([answers.read(shapes.file(run))["test"].correct for run in finished])  # [S,L,M]
    levels = [mean_interval(right[:, level]) for level in sorted({0, right.shape[1] - 1})]
    accuracies = [cells.accuracy(level.middle, (level.low, level.high)) for level in levels]
    return [title, f"{fmean(minutes):.0f}", *["–"] * (2 - len(levels)), *accuracies, line]

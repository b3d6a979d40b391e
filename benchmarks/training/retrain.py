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

import torch

from benchmarks import ROOT, cells, read_recipe
from benchmarks.embedded import GUIDE, PART, STUDENT, TEACHER, batches, prompts, right_answers
from benchmarks.training import shapes
from benchmarks.training.run import STORED, Evaluation, Run, command, work
from benchmarks.waveclip.observed import observe
from common.data.embedded.module import class_names, scenes_of
from common.models import load_model
from common.weights import read_record
from waveclip import WaveTower

_WAVE = "waveclip/embedded.yaml"
RUNS = (
    Run("teacher", "common/embedded_clip.yaml", 26, output=TEACHER),
    Run("waveclip", _WAVE, 50, output=STUDENT),
    *(Run(f"waveclip-seed{seed}", _WAVE, 15, seed) for seed in range(3)),
    Run("waveclip-short", _WAVE, 3),
    Run("waveclip-new-only", _WAVE, 3, settings={"model": {"train": "new"}}),
    Run("waveclip-random-start", _WAVE, 3, settings={"model": {"start": "random"}}),
    Run("guide", "mlip/guide_mae.yaml", 3, output=GUIDE),
    *shapes.RUNS,
)


def chosen(only: str | None) -> list[Run]:
    """The runs whose name fits a pattern such as ``shapes-*``, or all runs. ValueError: no name fits."""
    runs = [run for run in RUNS if fnmatchcase(run.name, only or "*")]
    if not runs:
        raise ValueError(f"ONLY={only} is no run; there are {', '.join(run.name for run in RUNS)}")
    return runs


def main(arguments: Sequence[str] = ()) -> int:
    """Train what is not finished. ONLY=NAME: that run, or ONLY='shapes-*': those; CONFIG=FILE: an overlay on recipes.

    With an overlay, weights and results stay in run folders of their own. A smoke run lists.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks retrain", description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores (LIST=1)")
    listing = parser.parse_args(arguments).list or any(os.environ.get(name) for name in ("LIST", "SMOKE"))
    overlay = os.environ.get("CONFIG") or None
    if overlay and not Path(overlay).is_file():
        raise ValueError(f"CONFIG={overlay}: no file at {Path(overlay).absolute()}")
    for run in chosen(os.environ.get("ONLY")):
        work([run], _evaluation(run, overlay), listing, overlay)
    return 0


def _evaluation(run: Run, overlay: str | None) -> Evaluation:
    """How a run's weights are evaluated."""
    if run not in shapes.RUNS:
        return evaluate
    return partial(shapes.evaluate, output=None if overlay else shapes.file(run.name))


def evaluate(
    weights: Path, recipe: str, splits: Sequence[str] = ("val", "test"), count: int | None = None
) -> dict[str, Any]:
    """Zero-shot accuracy on some splits: {"names": C, split: {level: ...}}; the one level of a CLIP is "top1".

    "first" counts the right answers on the first PART pictures, for a check that need not see all of them.
    recipe: of the training; it holds the image size, and the teacher of a WaveCLIP.
    count: how many of the first images of a split, a multiple of 250; None: all.
    """
    settings = read_recipe(recipe)
    size = settings["data"]["init_args"].get("image_size")
    student = WaveTower.load(weights).eval() if "wave" in read_record(weights) else None
    clip = load_model(str(ROOT / settings["model"]["init_args"]["weights"] if student else weights)).text_encoder()
    texts = prompts(revision=1)
    result: dict[str, Any] = {"names": len(class_names("seen"))}
    with torch.no_grad():
        for split in splits:
            pictures = batches(split, count, size, revision=1)
            if student is None:
                levels = {"top1": right_answers(clip, pictures, texts)}
            else:
                correct = observe(clip, student, pictures, texts).correct
                names = ["coarse", *(f"level {step}" for step in range(1, len(correct) - 1)), "fine"]
                levels = dict(zip(names, correct, strict=True))
            result[split] = {
                name: {**cells.accuracy_of(right), "pictures": len(right), "first": int(right[:PART].sum())}
                for name, right in levels.items()
            }
    return result


def results() -> dict[str, dict[str, Any]]:
    """The stored result of every finished run, by name."""
    paths = {run.name: STORED / f"{run.name}.json" for run in RUNS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def table() -> str:
    """All runs as a Markdown table, with the command of those that were not run; a line for the seeds of a family."""
    known, rows = results(), []
    for run in RUNS:
        if run in shapes.RUNS:
            continue
        if run.name not in known:
            rows.append([run.name, "–", "not run", "not run", f"`make retrain ONLY={run.name}`"])
            continue
        result = known[run.name]
        test = result.get("test", {})  # a Guide has none
        levels = [test.get(name) for name in ("coarse", "fine" if "fine" in test else "top1")]
        accuracies = [cells.accuracy(level["accuracy"], level["interval"]) if level else "–" for level in levels]
        rows.append([run.name, f"{result['minutes']:.0f}", *accuracies, f"`{shlex.join(command(run))}`"])
    rows += [_family(name, [known[run.name] for run in runs if run.name in known]) for name, runs in shapes.FAMILIES]
    runs = cells.table(["run", "minutes", "coarse, test", "fine, test", "command"], rows, left=(0, 4))
    note = f"Top-1 among {len(class_names('seen')):,} names; a teacher has one level. {_spread(known)}"
    shape_names = len(scenes_of(2).class_names("seen"))
    return f"{runs}\n\n{note.strip()} The runs named shapes tell {shape_names} names apart, on scenes of shape.\n"


def _family(name: str, finished: Sequence[dict[str, Any]]) -> list[str]:
    """A family's line: the minutes of a run, the mean accuracy over its finished seeds, and the command of all."""
    line = f"`make retrain ONLY='{name}-*'`"
    title = f"{name}, {len(finished)} of {len(shapes.SEEDS)} seeds"
    if not finished:
        return [title, "–", "not run", "not run", line]
    tests = [result["test"] for result in finished]
    levels = [[test[level]["accuracy"] for test in tests if level in test] for level in ("coarse", "fine", "top1")]
    coarse, fine, only = (cells.percent(values) if values else None for values in levels)
    minutes = fmean(result["minutes"] for result in finished)
    return [title, f"{minutes:.0f}", coarse or "–", fine or only, line]


def _spread(known: dict[str, dict[str, Any]]) -> str:
    """The range over the training seeds of the 15-minute runs."""
    seeds = [result["test"] for name, result in known.items() if name.startswith("waveclip-seed")]
    if len(seeds) < 2:
        return ""
    ranges = []
    for level in ("coarse", "fine"):
        values = [100 * test[level]["accuracy"] for test in seeds]
        ranges.append(f"{level} {min(values):.1f} to {max(values):.1f}")
    return f"Over {len(seeds)} training seeds of the 15-minute runs: {', '.join(ranges)}."

"""Patch Ranking's Figure 5 at embedded scale: pruning before the first block, without tuning, measured here.

It compares class attention, two reducers that compare tokens with each other, random places, the predictor, and the
golden oracle, which ranks the test pictures themselves.

Shapes: S seeds, M images in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import read_log
from benchmarks.cells import Result, missing_runs, percent, points, saved, table
from benchmarks.figures import name_lines
from benchmarks.patchrank.evaluate import gmacs, golden, oracle, plain
from benchmarks.patchrank.methods import DENSE, training_free
from benchmarks.patchrank.runs import COMMAND
from benchmarks.patchrank.tasks import COMMITTED, KEEPS, SEEDS, SHAPES, answers
from benchmarks.statistics import difference, mean_interval
from benchmarks.together.embedded_reference import sentence
from common.clip import CLIP
from common.conditions import conditions, digest
from common.reduction import ReducedTower
from common.zeroshot import embed_prompts
from patchrank.predictor import load_predictor
from patchrank.reducers import RandomKeep
from patchrank.tower import PatchRankTower

LAYER, PICTURES = 0, 500
Key = tuple[Any, ...]
"""Method, keep rate and number of the training seed; the keys of costs have no seed."""
ATTENTION, ORACLE, PREDICTOR = "class attention", "golden ranking (oracle)", "predictor"
FREE = {ATTENTION: ATTENTION, "DivPrune": "DivPrune", "k-medoids": "k-medoids", "random places": "given scores"}
"""Methods that need no training, and what ``training_free`` calls them."""
METHODS = (*FREE, ORACLE, PREDICTOR)


def run(smoke: bool = False) -> dict[str, Any]:
    """Right answers on test pictures of scenes of shape. smoke: a few pictures, one keep rate."""
    files = [COMMITTED / f"first-seed{seed}.safetensors" for seed in SEEDS]
    files, keeps = [file for file in files if file.is_file()], KEEPS[-1:] if smoke else KEEPS
    setting = conditions(
        "embedded",
        seeds=len(files),
        dtype="float32",
        reported_on="test, the first pictures",
        weights={file.name: digest(file) for file in (SHAPES.weights, *files)},
    )
    if not smoke:
        read_log.record("patchrank-fig5", SHAPES.logged, [SHAPES.weights, *files])
        setting["reads_of_test"] = read_log.reads_of_all(SHAPES.logged)
    clip, pictures = SHAPES.clip(), SHAPES.pictures("test", 8 if smoke else PICTURES)
    size, towers = clip.image_tower.image_size, _towers(clip, files, keeps)
    rankings = golden(clip.image_tower, pictures, LAYER)
    encoders = {key: plain(tower) for key, tower in towers.items()}
    encoders |= {(ORACLE, keep, 0): oracle(clip.image_tower, rankings, keep, LAYER) for keep in keeps}
    right = answers(encoders, pictures, size, embed_prompts(clip, SHAPES.module.class_prompts))
    costs = {(name, keep): gmacs(tower, size) for (name, keep, _), tower in towers.items()}
    given = {keep: ReducedTower(clip.image_tower, {LAYER: RandomKeep(keep)}) for keep in keeps}
    costs |= {(ORACLE, keep): gmacs(tower, size) for keep, tower in given.items()}  # its order costs nothing here
    rows = [_row(right, costs, name, keep) for name in (DENSE, *METHODS) for keep in (1.0, *keeps)]
    setting |= {"pictures": len(pictures), "names": len(pictures.class_names)}
    return {"name": "patchrank-fig5", "conditions": setting, "rows": [row for row in rows if row]}


def _towers(clip: CLIP, files: Sequence[Path], keeps: Sequence[float]) -> dict[Key, nn.Module]:
    """The dense tower, and at each keep rate those pruned without training and by each training seed's predictor."""
    tower = clip.image_tower
    predictors = [load_predictor(file, tower, LAYER).eval() for file in files]
    towers: dict[Key, nn.Module] = {(DENSE, 1.0, 0): tower}
    for keep in keeps:
        free = training_free(tower, keep, LAYER)
        towers |= {(name, keep, 0): free[method] for name, method in FREE.items()}
        for seed, predictor in enumerate(predictors):
            towers[PREDICTOR, keep, seed] = PatchRankTower(tower, predictor, keep, LAYER)
    return towers


def _row(right: Mapping[Key, Tensor], costs: Mapping[Key, float], name: str, keep: float) -> dict[str, Any] | None:
    """Accuracies of one method at one keep rate by seed, and its lead over class attention; None: it was not run."""
    by_seed = [correct for key, correct in right.items() if key[:2] == (name, keep)]
    if not by_seed:
        return None
    rival = right.get((ATTENTION, keep, 0))
    lead = None
    if rival is not None and name != ATTENTION:
        lead = difference(torch.stack(by_seed).float(), rival[None].float()).ends
    accuracy = [correct.double().mean().item() for correct in by_seed]
    interval = mean_interval(torch.stack(by_seed)).ends[1:]
    row = {"method": name, "keep": keep, "accuracy": accuracy, "interval": interval}
    return row | {"gmacs": costs[name, keep], "lead": lead}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    (dense,) = (row["gmacs"] for row in result["rows"] if row["method"] == DENSE)
    rows = []
    for row in result["rows"]:
        cost = [f"{row['gmacs']:.4f}", saved(row["gmacs"], dense)]
        rows.append([row["method"], f"{row['keep']:.0%}", *cost, percent(row["accuracy"]), points(row["lead"])])
    setting = result["conditions"]
    not_run = "" if setting["seeds"] else f" The predictor: not run (`{COMMAND}` trains it)."
    note = (
        f"Scenes of shape, {setting['pictures']:,} test pictures among {setting['names']:,} names, pruned before the "
        "first block, no tuning. All read what enters that block; the oracle keeps what the "
        "golden ranking of the picture itself (feature preservation, greedy) puts first. Predictor: "
        f"{setting['seeds']} training seeds; random places: one draw for all pictures. GMACs leave out the search for "
        "the golden ranking. Differences in points, 95 % intervals over seeds and pictures. The paper draws curves and "
        f"prints no numbers.{not_run}{read_log.remark(setting)}"
    )
    text = table(["method", "keep", "GMACs", "saved", "top-1, %", "against class attention"], rows)
    return {"md": f"{text}\n\n{sentence()}\n\n{note}\n", "figures": {"patchrank-fig5": _draw(result)}}


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trainings of the predictor before the first block that were not run."""
    rows = [("predictor before the first block", result["conditions"]["seeds"], len(SEEDS))]
    yield from missing_runs(rows, COMMAND)


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    (dense,) = (row for row in result["rows"] if row["method"] == DENSE)
    for name in METHODS:
        rows = [dense, *(row for row in result["rows"] if row["method"] == name)]
        if len(rows) > 1:
            means = [100 * fmean(row["accuracy"]) for row in rows]
            keeps = [100 * row["keep"] for row in rows]
            (line,) = axes.plot(keeps, means, "o-", markersize=4, label=name)
            low, high = ([100 * row["interval"][end] for row in rows] for end in (0, 1))
            axes.fill_between(keeps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title="pruned before the first block", xlabel="patch tokens kept, %", ylabel="top-1, %")
    axes.invert_xaxis()
    name_lines(axes, 0.45)
    return figure

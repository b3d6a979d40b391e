"""Trains and evaluates what Patch Ranking's tables show: `python -m benchmarks patchrank-runs [--list]`.

The baselines and the golden oracle come first, since they need no training. Then every task has a predictor for each
seed, and scenes of shape one that prunes before the first block; then prompts of two kinds, tuned without pruning and
at keep .6; then the rivals that are trained, and the controls of CrossGET and DynamicViT. A series that stops early
leaves whole rows. What is finished is skipped, and --only PATTERN takes the runs of these names alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import read_log, read_recipe
from benchmarks.cells import table
from benchmarks.embedded import FASHION_MNIST_ATTRIBUTION
from benchmarks.patchrank.evaluate import (
    evaluate_avit,
    evaluate_baselines,
    evaluate_first,
    evaluate_predictor,
    evaluate_prompts,
)
from benchmarks.patchrank.tasks import (
    CIFAR_10_ATTRIBUTION,
    COMMITTED,
    KEEP,
    RECIPES,
    SEEDS,
    SHAPES,
    TASKS,
    Task,
    pruned_depth,
    search,
)
from benchmarks.patchrank.trained_rivals import TRAINED_RIVALS, evaluate_untrained
from benchmarks.patchrank.trained_rivals import UNTRAINED as CONTROLS
from benchmarks.training.run import RECIPES as MINUTES
from benchmarks.training.run import STORED, Run, work
from common.clip import load_architecture
from common.conditions import conditions
from common.data.embedded.shapes import ATTRIBUTION
from common.paths import runs_directory
from common.reducer_registry import REVISION
from patchrank.reducers.dynamicvit import stage_blocks

COMMAND = "python -m benchmarks patchrank-runs"
RESULTS = STORED / "patchrank"
KINDS = {"text": "T", "coupled": "V+T"}
"""Kinds of prompts, and the paper's names of them."""
TUNED_AT = (1.0, KEEP)
UNTRAINED: dict[str, Callable[[Task], dict[str, Any]]] = {
    "baselines": evaluate_baselines,
    **{what: partial(evaluate_untrained, sibling=sibling) for what, sibling in CONTROLS.items()},
}
"""Evaluations that need no training, by the names of their results."""


@dataclass(frozen=True)
class Item:
    """A training, the task on whose test pictures its weights are evaluated (None: on none), and that evaluation."""

    run: Run
    task: Task | None
    evaluate: Callable[[Path], dict[str, Any]]

    def measure(self, weights: Path) -> dict[str, Any]:
        """Evaluate the weights, once the log of reads of test says so."""
        if self.task is not None:
            read_log.record("patchrank-runs", self.task.logged, list({weights, self.task.weights}))
        return self.evaluate(weights)


def name_of(task: Task, what: str, seed: int) -> str:
    """A run's name: the stem of its result file in ``RESULTS``."""
    return f"{task.key}-{what}-seed{seed}"


def items(tasks: Sequence[Task] = TASKS, seeds: Sequence[int] = SEEDS) -> Iterator[Item]:
    """The trainings, row by row; a training comes after those that it needs."""
    pairs = [(task, seed) for task in tasks for seed in seeds]
    for task, seed in pairs:
        evaluate = partial(evaluate_predictor, task=task, seed=seed)
        yield Item(_on_pictures(task, "predictor", "predictor", seed), task, evaluate)
    for seed in seeds if SHAPES in tasks else ():
        run = _on_pictures(SHAPES, "first", "predictor", seed, prune_layer=0)
        yield Item(run, None, partial(evaluate_first, seed=seed))
    for kind, keep in ((kind, keep) for kind in reversed(KINDS) for keep in reversed(TUNED_AT)):
        for task, seed in pairs:
            evaluate = partial(evaluate_prompts, task=task, kind=kind, keep=keep, seed=seed)
            yield Item(_prompts(task, kind, keep, seed), task, evaluate)
    for task, seed in pairs:
        yield Item(_on_pictures(task, "avit", "avit", seed), task, partial(evaluate_avit, task=task))
    for rival in TRAINED_RIVALS.values():
        for task, seed in pairs:
            run = _on_pictures(task, rival.recipe, rival.recipe, seed, keep=rival.rates[task])
            yield Item(run, task, partial(rival.evaluate, task=task))


def _run(task: Task, what: str, recipe: str, seed: int, model: Mapping[str, Any], data: Mapping[str, Any]) -> Run:
    """A run on a task's data and CLIP. model, data: further changes of the recipe."""
    common = {"architecture": task.architecture}
    model = {**common, "weights": f"benchmarks/weights/{task.weights.name}", **model}
    data = {**common, "name": task.data, **data} | ({} if task.held_out is None else {"held_out": task.held_out})
    recipe = RECIPES[recipe]
    name = f"patchrank/{name_of(task, what, seed)}"
    places = {"data": {"name": task.place}} if task.folder else {}
    return Run(name, recipe, MINUTES[recipe], seed, {"model": model, "data": data}, places=places)


def _on_pictures(task: Task, what: str, recipe: str, seed: int, **model: Any) -> Run:
    """A training that reads a task's pictures; CrossGET's reads their classes' prompts too, the others no labels."""
    vision = load_architecture(task.architecture)["vision_cfg"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    if recipe == "predictor":
        model |= search(tokens)
    elif recipe == "avit":
        model["depth"] = pruned_depth(tokens, vision["layers"])
    elif recipe == "attention_tuning":
        model["place"] = stage_blocks(vision["layers"])
    return _run(task, what, recipe, seed, model, {"shots": task.shots})


def _prompts(task: Task, kind: str, keep: float, seed: int) -> Run:
    """A tuning with the same seed's predictor, and prompts in every layer of the text tower.

    The recorded path of the predictor is the one in the default run folder.
    """
    depth = load_architecture(task.architecture)["text_cfg"]["layers"]
    file = f"retrain/patchrank/{name_of(task, 'predictor', seed)}/weights.safetensors"
    model: dict[str, Any] = {
        "kind": kind,
        "depth": depth,
        "keep": keep,
        "predictor": f"runs/{file}" if keep < 1 else None,
    }
    recipe = read_recipe(RECIPES["prompts"])["model"]["init_args"]
    words = {"words": task.words, "template": task.template}
    # What the recipe already says is left out: on a command line {} alone is an empty mapping.
    model |= {name: value for name, value in words.items() if value != recipe[name]}
    run = _run(task, f"{kind}-{keep}", "prompts", seed, model, {})
    path = str((runs_directory() / file).absolute())
    return replace(run, places=run.places | ({"model": {"predictor": path}} if keep < 1 else {}))


def main(arguments: Sequence[str] = ()) -> int:
    """Train and evaluate what is not finished, and write a result for each run. A smoke run lists."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many training seeds (default: all)")
    parser.add_argument("--only", default="*", help="a pattern of names, such as 'shapes-*'")
    args = parser.parse_args(arguments)
    listing, console = args.list or bool(os.environ.get("SMOKE")), Console()
    missing = {task: task.missing() for task in TASKS}
    for task, why in missing.items():
        if why:
            console.print(f"{task.name}: not run, {why}", markup=False)
    available = [task for task, why in missing.items() if not why]
    for task in available:
        for what, evaluate in UNTRAINED.items():
            name = f"{task.key}-{what}"
            if fnmatchcase(name, args.only):
                _untrained(name, task, evaluate, listing, console)
    for item in items(available, SEEDS[: args.seeds]):
        if fnmatchcase(item.run.name.removeprefix("patchrank/"), args.only):
            work([item.run], lambda weights, _, item=item: item.measure(weights), listing, apart=False)
    if not listing:
        write_cards()
    return 0


def _untrained(
    name: str, task: Task, evaluate: Callable[[Task], dict[str, Any]], listing: bool, console: Console
) -> None:
    """Evaluate what needs no training, unless its result is there."""
    finished = runs_directory() / "retrain" / "patchrank" / name / "result.json"
    state = "finished" if finished.is_file() else "about 2 min"
    console.print(f"patchrank/{name:<24} {state}", markup=False, highlight=False)
    if listing or finished.is_file():
        return
    read_log.record("patchrank-runs", task.logged, [task.weights])
    setting = conditions("embedded", seeds=None, seed=None, dtype="float32", reducers=REVISION)
    result = {"name": f"patchrank/{name}", "conditions": setting, **evaluate(task)}
    for path in (RESULTS / f"{name}.json", finished):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def results() -> dict[str, dict[str, Any]]:
    """The stored results of all runs, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def write_cards() -> None:
    """Write the cards of the committed weights: what they are, and how they were trained."""
    files = {f"{task.key}.safetensors": name_of(task, "predictor", 0) for task in TASKS}
    files |= {f"first-seed{seed}.safetensors": name_of(SHAPES, "first", seed) for seed in SEEDS}
    files |= {f"{task.key}_prompts.safetensors": name_of(task, f"coupled-{KEEP}", 0) for task in TASKS}
    COMMITTED.mkdir(parents=True, exist_ok=True)
    (COMMITTED / "README.md").write_text(_card("Predictors and prompts of Patch Ranking", COMMITTED, files))


def _card(title: str, folder: Path, files: Mapping[str, str]) -> str:
    """A card of the files that are in a folder. files: file name -> name of the run that trained it."""
    known = results()
    rows = []
    for file, name in files.items():
        if name not in known or not (folder / file).is_file():
            continue
        result, setting = known[name], known[name]["conditions"]
        tree = "clean tree" if setting["clean"] else "tree with changes"
        cells = [file, f"`{result['command']}`", setting["seed"], f"{setting['revision']} ({tree})", setting["date"]]
        rows.append([*cells, _measured(result)])
    formats = (
        "fp16 predictors (`patchrank.predictor.load_predictor`), fp32 prompts (`patchrank.Prompts.load`), made by "
        f"`{COMMAND}`."
    )
    credits = [ATTRIBUTION, CIFAR_10_ATTRIBUTION, FASHION_MNIST_ATTRIBUTION]
    head = ["file", "command", "seed", "revision at the start", "trained", "measured"]
    parts = [f"# {title}", formats, table(head, rows, left=(0, 1, 3, 4, 5)), *credits]
    return "\n\n".join(parts) + "\n"


def _measured(result: Mapping[str, Any]) -> str:
    if "overlap" in result:
        return f"val: {100 * result['overlap']:.1f} % of what it drops is right, Kendall's tau {result['tau']:.2f}"
    test = result["test"][str(KEEP)]
    return f"test, keep {KEEP}: {100 * test['accuracy']:.1f} % of {test['pictures']:,} pictures"

"""Trains and evaluates what Patch Ranking's tables show: `python -m benchmarks patchrank-runs [--list]`.

First what needs no training: the baselines and the golden oracle. Then, seed by seed, so that a stopped series leaves
whole tables of fewer seeds: one predictor for all tasks, one that prunes at the first block, and for every task a
predictor, an A-ViT and prompts of two kinds, tuned without pruning and at keep .6. What is finished is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from benchmarks.drift import first_losses
from benchmarks.embedded import WEIGHTS
from benchmarks.fashion_mnist import ATTRIBUTION as FASHION_ATTRIBUTION
from benchmarks.patchrank_costs import training_free
from benchmarks.patchrank_tasks import KEEP, KEEPS, PLAIN, PRUNE_LAYER, STYLES, TASKS, Encoder, Task, answers, stored
from benchmarks.retrain import RESULTS as RETRAINED
from benchmarks.retrain import Run, work
from common.conditions import conditions
from common.data.classification_module import ClassificationDataModule
from common.data.embedded import ATTRIBUTION
from common.data.pictures import loader
from common.flops import count_macs
from common.paths import runs_directory
from common.reduction import ReducedTower
from common.tower import ImageTower
from common.zeroshot import embed_prompts
from patchrank.avit import AViTTower
from patchrank.baselines import GoldenOracle, RandomKeep
from patchrank.predictor import RankPredictor, load_predictor, save_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.ranking import kendall_tau, pruned_overlap
from patchrank.rankings import Rankings, ranked
from patchrank.scores import keep_count
from patchrank.tower import PatchRankTower

RESULTS, COMMITTED = RETRAINED / "patchrank", WEIGHTS / "patchrank"
SEEDS = (0, 1, 2)
KINDS = {"text": "T", "coupled": "V+T"}
"""Kinds of prompts, and what the paper calls them."""
TUNED_AT = (1.0, KEEP)
RECIPES = {kind: f"patchrank/embedded_{kind}.yaml" for kind in ("predictor", "avit", "prompts")}
VAL = 400
"""Pictures of val on which a predictor is compared with golden rankings."""
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Item:
    """A training, and how what it made is evaluated."""

    run: Run
    evaluate: Callable[[Path], dict[str, Any]]


def name_of(task: Task, what: str, seed: int) -> str:
    """A run's name, its result's file in ``RESULTS`` but for the ending."""
    return f"{task.name.lower()}-{what}-seed{seed}"


def items(seed: int, tasks: Sequence[Task] = TASKS) -> Iterator[Item]:
    """The trainings of one seed, each after those that it needs."""
    yield _predictor(PLAIN, "predictor", seed, partial(evaluate_transfer, seed=seed))
    yield _predictor(PLAIN, "first", seed, partial(evaluate_first, seed=seed), prune_layer=0)
    for task in tasks:
        yield _predictor(task, "predictor", seed, partial(evaluate_predictor, task=task, seed=seed))
        yield Item(_run(task, "avit", RECIPES["avit"], seed, _shots(task)), partial(evaluate_avit, task=task))
        for kind in KINDS:
            for keep in TUNED_AT:
                yield _prompts(task, kind, keep, seed)


def _run(task: Task, what: str, recipe: str, seed: int, data: Mapping[str, Any], **model: Any) -> Run:
    """A run on a task's data and CLIP with some settings of data and model changed."""
    weights = f"benchmarks/weights/{task.weights.name}"
    model = {"architecture": task.architecture, "weights": weights, **model}
    data = {"name": task.data, "architecture": task.architecture, **data}
    if task.held_out is not None:
        data["held_out"] = task.held_out
    own = {"model": model, "data": data}
    typed = [
        word
        for section, settings in own.items()
        for name, value in settings.items()
        for word in (f"--{section}.init_args.{name}", "null" if value is None else str(value))
    ]
    return Run(f"patchrank/{name_of(task, what, seed)}", recipe, 1, seed, tuple(typed))


def _shots(task: Task) -> dict[str, Any]:
    return {"shots": task.shots}


def _predictor(task: Task, what: str, seed: int, evaluate: Callable[[Path], dict[str, Any]], **model: Any) -> Item:
    return Item(_run(task, what, RECIPES["predictor"], seed, _shots(task), **model), evaluate)


def _prompts(task: Task, kind: str, keep: float, seed: int) -> Item:
    """Prompts that are tuned beside the same seed's predictor; the recorded path is that of the default run folder."""
    place = f"retrain/patchrank/{name_of(task, 'predictor', seed)}/weights.safetensors"
    pruned = keep < 1
    run = _run(
        task, f"{kind}-{keep:.1f}", RECIPES["prompts"], seed, {},
        kind=kind, keep=keep, predictor=f"runs/{place}" if pruned else None,
    )  # fmt: skip
    there = ("--model.init_args.predictor", str((runs_directory() / place).absolute())) if pruned else ()
    run = Run(run.name, run.recipe, run.minutes, run.seed, run.settings, places=there)
    return Item(run, partial(evaluate_prompts, task=task, kind=kind, keep=keep, seed=seed))


def main(arguments: Sequence[str] = ()) -> int:
    """Train and evaluate what is not finished, and write a result for each run. A smoke run lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks patchrank-runs", description=main.__doc__)
    parser.add_argument("--list", action="store_true", help="the runs with their minutes on 2 cores")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many training seeds (default: all)")
    said = parser.parse_args(arguments)
    listing, console = said.list or bool(os.environ.get("SMOKE")), Console()
    missing = {task: task.missing() for task in TASKS}
    for task, why in missing.items():
        if why:
            console.print(f"{task.name}: not run, {why}", markup=False)
    there = [task for task, why in missing.items() if not why]
    for task in there:
        _baselines(task, listing, console)
    for seed in SEEDS[: said.seeds]:
        for item in items(seed, there):
            work([item.run], lambda weights, _, item=item: item.evaluate(weights), listing)
    if not listing:
        COMMITTED.mkdir(parents=True, exist_ok=True)
        (COMMITTED / "README.md").write_text(card())
    return 0


def _baselines(task: Task, listing: bool, console: Console) -> None:
    """Evaluate what needs no training, where it is not finished."""
    name = f"{task.name.lower()}-baselines"
    finished = runs_directory() / "retrain" / "patchrank" / name / "result.json"
    state = "finished" if finished.is_file() else "about 2 min"
    console.print(f"patchrank/{name:<24} {state}", markup=False, highlight=False)
    if listing or finished.is_file():
        return
    stated = conditions("embedded", seeds=None, seed=None, dtype="float32")
    found = {"name": f"patchrank/{name}", "conditions": stated, **evaluate_baselines(task)}
    for path in (RESULTS / f"{name}.json", finished):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def plain(module: nn.Module) -> Encoder:
    """An encoder of a batch that looks at nothing but its images."""
    return lambda batch: module(batch["image"])


def golden(tower: ImageTower, pictures: Any, image_size: int, prune_layer: int) -> Rankings:
    """The golden rankings by feature preservation, sliding windows of 2x2, from disk where they were computed before."""
    return ranked(tower, loader(pictures, image_size, 250), prune_layer=prune_layer)


def oracle(tower: ImageTower, rankings: Rankings, keep: float, prune_layer: int) -> Encoder:
    """An encoder that keeps what the golden ranking of each picture puts first."""

    def encode(batch: Mapping[str, Any]) -> torch.Tensor:
        return ReducedTower(tower, {prune_layer: GoldenOracle(keep, rankings.of(batch["key"]))})(batch["image"])

    return encode


def gmacs(tower: nn.Module, image_size: int) -> float:
    """GMACs of one picture, attention's products included."""
    return count_macs(tower, torch.zeros(1, 3, image_size, image_size)).gmacs


def evaluate_baselines(task: Task) -> dict[str, Any]:
    """Right answers on test of the dense tower, of every training-free method at keep .6, and of the golden oracle.

    Class attention at every keep rate; random keeping by three draws.
    """
    clip, pictures = task.clip(), task.pictures("test")
    tower, size = clip.image_tower, clip.image_tower.image_size
    built: dict[str, nn.Module] = {"all tokens": tower}
    for keep in KEEPS:
        built[f"class attention {keep}"] = training_free(tower, keep, PRUNE_LAYER)["class attention"]
    built |= {name: made for name, made in training_free(tower, KEEP, PRUNE_LAYER).items() if name in ("EViT", "ToMe")}
    built |= {f"random {draw}": ReducedTower(tower, {PRUNE_LAYER: RandomKeep(KEEP, draw)}) for draw in SEEDS}
    rankings = golden(tower, pictures, size, PRUNE_LAYER)
    encoders = {name: plain(made) for name, made in built.items()}
    encoders["golden"] = oracle(tower, rankings, KEEP, PRUNE_LAYER)
    found = answers(encoders, pictures, size, embed_prompts(clip, task.module.class_prompts))
    costs = {name: gmacs(made, size) for name, made in built.items()} | {"golden": gmacs(built["random 0"], size)}
    return {"gmacs": costs, "test": {name: stored(correct) for name, correct in found.items()}}


def agreement(predictor: RankPredictor, task: Task, prune_layer: int) -> dict[str, float]:
    """Share of the 40 % it drops that a golden ranking drops too, and Kendall's τ, on pictures of val."""
    tower, pictures = task.clip().image_tower, task.pictures("val", VAL)
    rankings = golden(tower, pictures, tower.image_size, prune_layer)
    overlap, tau = [], []
    with torch.no_grad():
        for batch in loader(pictures, tower.image_size, VAL):
            scores = predictor(tower.run_blocks(tower.embed(batch["image"]), stop=prune_layer))
            order = rankings.of(batch["key"])
            overlap.append(pruned_overlap(scores, order, tower.grid**2 - keep_count(KEEP, tower.grid**2)))
            tau.append(kendall_tau(scores, order))
    return {"overlap": torch.cat(overlap).mean().item(), "tau": torch.cat(tau).mean().item()}


def pruned_answers(predictor: RankPredictor, task: Task, keeps: Sequence[float]) -> dict[str, Any]:
    """Right answers on test and GMACs at some keep rates, without tuning."""
    clip, pictures = task.clip(), task.pictures("test")
    size = clip.image_tower.image_size
    towers = {str(keep): PatchRankTower(clip.image_tower, predictor, keep, PRUNE_LAYER) for keep in keeps}
    classes = embed_prompts(clip, task.module.class_prompts)
    found = answers({keep: plain(made) for keep, made in towers.items()}, pictures, size, classes)
    return {
        "gmacs": {keep: gmacs(made, size) for keep, made in towers.items()},
        "test": {keep: stored(correct) for keep, correct in found.items()},
    }


def _kept(weights: Path, task: Task, name: str, seeds: Sequence[int], seed: int, layer: int) -> RankPredictor:
    """The predictor of a run's weights, put beside the committed ones where its seed is one of ``seeds``."""
    predictor = load_predictor(weights, task.clip().image_tower, layer).eval()
    if seed in seeds:
        save_predictor(predictor, COMMITTED / f"{name}.safetensors", layer)
    return predictor


def evaluate_predictor(weights: Path, task: Task, seed: int) -> dict[str, Any]:
    """A predictor on the task that it was trained for, at every keep rate."""
    predictor = _kept(weights, task, task.name.lower(), (0,), seed, PRUNE_LAYER)
    found = agreement(predictor, task, PRUNE_LAYER) | pruned_answers(predictor, task, KEEPS)
    return found | _losses("predictor", task, seed)


def evaluate_transfer(weights: Path, seed: int) -> dict[str, Any]:
    """The predictor for all tasks: on each of them at keep .6."""
    predictor = _kept(weights, PLAIN, "plain", (0,), seed, PRUNE_LAYER)
    tasks = {task.name: pruned_answers(predictor, task, (KEEP,))["test"][str(KEEP)] for task in STYLES}
    return agreement(predictor, PLAIN, PRUNE_LAYER) | {"tasks": tasks}


def evaluate_first(weights: Path, seed: int) -> dict[str, Any]:
    """The predictor that prunes at the first block, which Figure 5 evaluates."""
    return agreement(_kept(weights, PLAIN, f"first-seed{seed}", SEEDS, seed, 0), PLAIN, 0)


@torch.no_grad()
def evaluate_avit(weights: Path, task: Task) -> dict[str, Any]:
    """A-ViT on test: right answers, and what its pictures cost on average."""
    avit, clip, pictures = AViTTower.load(weights).eval(), task.clip(), task.pictures("test")
    size, saved, depth = clip.image_tower.image_size, [], []

    def encode(batch: Mapping[str, Any]) -> torch.Tensor:
        halting = avit.run(batch["image"])
        saved.append(avit.saved_macs(halting.active)[0])
        depth.append(halting.depth)
        return halting.z

    found = answers({"avit": encode}, pictures, size, embed_prompts(clip, task.module.class_prompts))
    cost = gmacs(avit, size) - torch.cat(saved).mean().item() / 1e9
    return {"gmacs": cost, "depth": torch.cat(depth).mean().item(), "test": stored(found["avit"])}


def evaluate_prompts(weights: Path, task: Task, kind: str, keep: float, seed: int) -> dict[str, Any]:
    """Tuned prompts: at their own keep rate on val and test, those tuned with pruning at every rate on test."""
    tuned = PromptedCLIP.load(weights).eval()
    tower, size = tuned.tower, tuned.tower.tower.image_size
    if seed == 0 and (kind, keep) == ("coupled", KEEP):
        tower.prompts.save(COMMITTED / f"{task.name.lower()}_prompts.safetensors")
    keeps = KEEPS if keep < 1 else (keep,)
    towers = {str(of): PatchRankTower(tower.tower, tower.predictor, of, PRUNE_LAYER, tower.prompts) for of in keeps}
    classes = embed_prompts(tuned, task.module.class_prompts)
    encoders = {of: plain(made) for of, made in towers.items()}
    own = {str(keep): encoders[str(keep)]}
    found = {
        "gmacs": {of: gmacs(made, size) for of, made in towers.items()},
        "val": stored(answers(own, task.pictures("val", 1000), size, classes)[str(keep)]),
        "test": {of: stored(right) for of, right in answers(encoders, task.pictures("test"), size, classes).items()},
    }
    return found | (_losses("prompts", task, seed) if (kind, keep) == ("coupled", KEEP) else {})


def _losses(kind: str, task: Task, seed: int) -> dict[str, list[float]]:
    """The first losses of a recipe's first run, by which a later check sees that it drifted."""
    return {"first_losses": recipe_losses(kind)} if seed == 0 and task is TASKS[0] else {}


def recipe_losses(kind: str) -> list[float]:
    """The losses of the first steps of an embedded recipe, on one shot of each name."""
    arguments = yaml.safe_load((_ROOT / RECIPES[kind]).read_text())["data"]["init_args"]
    return first_losses(RECIPES[kind], data=ClassificationDataModule(**arguments | {"shots": 1, "num_workers": 0}))


def results() -> dict[str, dict[str, Any]]:
    """The stored result of everything that was run, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def card() -> str:
    """What the committed weights are and where they come from."""
    known, lines = results(), []
    files = {f"{task.name.lower()}.safetensors": name_of(task, "predictor", 0) for task in (*TASKS, PLAIN)}
    files |= {f"first-seed{seed}.safetensors": name_of(PLAIN, "first", seed) for seed in SEEDS}
    files |= {f"{task.name.lower()}_prompts.safetensors": name_of(task, f"coupled-{KEEP}", 0) for task in TASKS}
    for file, name in files.items():
        if name not in known or not (COMMITTED / file).is_file():
            continue
        made, stated = known[name], known[name]["conditions"]
        tree = "clean tree" if stated["clean"] else "tree with changes"
        lines.append(
            f"| {file} | `{made['command']}` | {stated['seed']} | {stated['revision']} ({tree}) | {stated['date']} "
            f"| {_measured(made)} |"
        )
    return "\n".join([_CARD_HEAD, *lines, "", ATTRIBUTION, "", FASHION_ATTRIBUTION]) + "\n"


_CARD_HEAD = """# Predictors and prompts of Patch Ranking

fp16 predictors (`patchrank.predictor.load_predictor`) and fp32 prompts (`patchrank.Prompts.load`) for the embedded CLIP
and for that of Fashion-MNIST, made by `python -m benchmarks patchrank-runs`.

| file | command | seed | revision at the start | trained | measured |
|---|---|---:|---|---|---|"""


def _measured(made: Mapping[str, Any]) -> str:
    if "overlap" in made:
        return f"val: {100 * made['overlap']:.1f} % of what it drops is right, Kendall's tau {made['tau']:.2f}"
    found = made["test"][str(KEEP)]
    return f"test, keep {KEEP}: {100 * found['accuracy']:.1f} % of {found['pictures']:,} pictures"

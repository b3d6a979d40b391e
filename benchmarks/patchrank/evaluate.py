"""Evaluation of what Patch Ranking's runs train: answers on test, multiply-adds, agreement with golden rankings.

Shapes: B images of a batch, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import read_recipe
from benchmarks.patchrank.methods import DENSE, OURS, methods, training_free
from benchmarks.patchrank.tasks import (
    COMMITTED,
    KEEP,
    KEEPS,
    PRUNE_LAYER,
    RECIPES,
    SEARCHED,
    SEEDS,
    SHAPES,
    Encoder,
    Task,
    answers,
    search,
    stored,
)
from benchmarks.training.drift import first_losses
from common.clip import CLIP
from common.data.classification import ClassificationSet
from common.data.classification_module import ClassificationDataModule
from common.data.pictures import PictureSet, loader
from common.flops import count_macs
from common.preprocess import Preprocess
from common.reduction import ReducedTower
from common.tower import ImageTower
from common.zeroshot import embed_prompts, similarity
from patchrank.avit import AViTTower
from patchrank.golden import golden_ranking
from patchrank.golden_cache import Rankings, ranked
from patchrank.golden_swaps import swapped
from patchrank.losses import kendall_tau, pruned_overlap
from patchrank.predictor import RankPredictor, load_predictor, save_predictor
from patchrank.prompted import PromptedCLIP
from patchrank.reducers import GoldenOracle, RandomKeep
from patchrank.scores import keep_count
from patchrank.tower import PatchRankTower

VAL = 200
"""Number of val pictures on which a predictor is compared with golden rankings."""
EXCHANGES = 5
"""The most exchanges of patches by which the oracle's stronger search betters a picture's greedy ranking."""
RIVALS = ("class attention", "EViT", "ToMe", "DivPrune", "k-medoids")
"""The methods that are compared with Patch Ranking at equal GMACs too."""
FEWER, MORE = "fewer GMACs", "more GMACs"
"""A rival's two neighbours of Patch Ranking in cost."""


def plain(module: nn.Module) -> Encoder:
    """An encoder that reads only the images of a batch."""
    return lambda batch: module(batch["image"])


def golden(tower: ImageTower, pictures: PictureSet, prune_layer: int) -> Rankings:
    """Golden rankings by feature preservation: greedy, windows of 2x2, cached on disk."""
    batches = loader(pictures, Preprocess(tower.image_size), 250)
    return ranked(tower, batches, prune_layer=prune_layer, **search(tower.grid**2))


def oracle(tower: ImageTower, rankings: Rankings, keep: float, prune_layer: int) -> Encoder:
    """An encoder that keeps the first patches of each picture's golden ranking."""

    def encode(batch: Mapping[str, Any]) -> Tensor:
        return ReducedTower(tower, {prune_layer: GoldenOracle(keep, rankings.of(batch["key"]))})(batch["image"])

    return encode


def gmacs(tower: nn.Module, image_size: int) -> float:
    """GMACs of one picture, with attention's products."""
    return count_macs(tower, torch.zeros(1, 3, image_size, image_size)).gmacs


def evaluate_baselines(task: Task) -> dict[str, Any]:
    """Right answers on test of the dense tower, of every training-free method, and of the golden oracle.

    Methods are evaluated at keep .6, class attention at every keep rate, random keeping with three draws, and each of
    RIVALS at its two numbers of patches between whose costs Patch Ranking's at keep .6 lies.
    """
    clip, pictures = task.clip(), task.pictures("test")
    tower, size = clip.image_tower, clip.image_tower.image_size
    free = training_free(tower, KEEP, PRUNE_LAYER)
    towers: dict[str, nn.Module] = {DENSE: tower} | {name: free[name] for name in RIVALS[1:]}
    for keep in KEEPS:
        towers[f"class attention {keep}"] = training_free(tower, keep, PRUNE_LAYER)["class attention"]
    towers |= {f"random {draw}": ReducedTower(tower, {PRUNE_LAYER: RandomKeep(KEEP, draw)}) for draw in SEEDS}
    budget = gmacs(methods(tower, KEEP, PRUNE_LAYER)[OURS], size)
    for name in RIVALS:
        fewer, more = around(tower, name, budget)
        towers |= {f"{name}, {FEWER}": fewer, f"{name}, {MORE}": more}
    classes = embed_prompts(clip, task.module.class_prompts)
    test = evaluate_towers(towers, pictures, size, classes)
    return {"test": test, "oracle": evaluate_oracle(task, clip, classes)}


def around(tower: ImageTower, name: str, budget: float) -> tuple[nn.Module, nn.Module]:
    """A method that keeps the most patches within a budget of GMACs, and the same with the next cost above it."""
    patches, size = tower.grid**2, tower.image_size

    def kept(count: int) -> tuple[nn.Module, float]:
        built = training_free(tower, count / patches, PRUNE_LAYER)[name]
        return built, gmacs(built, size)

    low, high = 1, patches  # the first lies within the budget, the second above it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle)[1] <= budget else (low, middle)
    return kept(low)[0], kept(high)[0]


@torch.no_grad()
def evaluate_oracle(task: Task, clip: CLIP, classes: Tensor) -> dict[str, Any]:
    """Golden rankings of some test pictures by two searches: right answers, and what embeddings lose at keep .6.

    "searched" removes a few patches a round, one at a time, and then exchanges patches; "greedy" is the ranking that
    predictors learn. classes: [C,E].
    """
    tower, size = clip.image_tower, clip.image_tower.image_size
    pictures = task.pictures("test")
    part = pictures.subset(task.chosen(len(pictures), min(SEARCHED, len(pictures))))
    patches = tower.grid**2
    kept = keep_count(KEEP, patches)
    few = max(1, (patches - kept) // 7)
    rounds = -(-(patches - kept) // few) + 1
    batches = list(loader(part, Preprocess(size), 50))
    orders: dict[str, list[Tensor]] = {"greedy": [], "searched": []}
    for batch in batches:
        images = batch["image"]
        orders["greedy"].append(golden_ranking(tower, images, prune_layer=PRUNE_LAYER, **search(patches)).order)
        fine = golden_ranking(tower, images, prune_layer=PRUNE_LAYER, block=1, rounds=rounds, removed_per_round=few)
        orders["searched"].append(swapped(tower, images, fine.order, kept, PRUNE_LAYER, EXCHANGES))
    result = {}
    cost = gmacs(ReducedTower(tower, {PRUNE_LAYER: RandomKeep(KEEP)}), size)  # an order that is given costs nothing
    for name, by_batch in orders.items():
        right, lost = [], []
        for batch, order in zip(batches, by_batch, strict=True):
            z = ReducedTower(tower, {PRUNE_LAYER: GoldenOracle(KEEP, order)})(batch["image"])
            right.append(similarity(z, classes).argmax(-1) == batch["label"])
            lost.append(1 - F.cosine_similarity(tower(batch["image"]), z, dim=-1))
        result[name] = stored(torch.cat(right), cost) | {"lost": torch.cat(lost).mean().item()}
    return result


def agreement(predictor: RankPredictor, task: Task, prune_layer: int) -> dict[str, float]:
    """Agreement with golden rankings on val: the share of dropped patches (40 %) that both drop, and Kendall's τ."""
    tower, pictures = task.clip().image_tower, task.pictures("val", VAL)
    rankings = golden(tower, pictures, prune_layer)
    overlap, tau = [], []
    with torch.no_grad():
        for batch in loader(pictures, Preprocess(tower.image_size), VAL):
            scores = predictor(tower.run_blocks(tower.embed(batch["image"]), stop=prune_layer))
            order = rankings.of(batch["key"])
            overlap.append(pruned_overlap(scores, order, tower.grid**2 - keep_count(KEEP, tower.grid**2)))
            tau.append(kendall_tau(scores, order))
    return {"overlap": torch.cat(overlap).mean().item(), "tau": torch.cat(tau).mean().item()}


def evaluate_towers(
    towers: Mapping[str, nn.Module], pictures: ClassificationSet, image_size: int, classes: Tensor
) -> dict[str, Any]:
    """Right answers and GMACs of towers, by name, as ``stored`` writes them. classes: [C,E]."""
    right = answers({name: plain(tower) for name, tower in towers.items()}, pictures, image_size, classes)
    return {name: stored(correct, gmacs(towers[name], image_size)) for name, correct in right.items()}


def untuned(predictor: RankPredictor, task: Task, keeps: Sequence[float]) -> dict[str, Any]:
    """The tower pruned without tuning, on a task's test pictures at some keep rates."""
    clip = task.clip()
    towers = {str(keep): PatchRankTower(clip.image_tower, predictor, keep, PRUNE_LAYER) for keep in keeps}
    classes = embed_prompts(clip, task.module.class_prompts)
    return evaluate_towers(towers, task.pictures("test"), clip.image_tower.image_size, classes)


def _loaded(weights: Path, task: Task, layer: int, committed: Path | None) -> RankPredictor:
    """The predictor in a run's weights; it is also written to ``committed``."""
    predictor = load_predictor(weights, task.clip().image_tower, layer).eval()
    if committed is not None:
        save_predictor(predictor, committed, layer)
    return predictor


def evaluate_predictor(weights: Path, task: Task, seed: int) -> dict[str, Any]:
    """A predictor on its own task, at every keep rate."""
    committed = COMMITTED / f"{task.key}.safetensors"
    predictor = _loaded(weights, task, PRUNE_LAYER, None if seed else committed)
    result = agreement(predictor, task, PRUNE_LAYER) | {"test": untuned(predictor, task, KEEPS)}
    return result | _losses("predictor", task, seed)


def evaluate_first(weights: Path, seed: int) -> dict[str, Any]:
    """The predictor that prunes scenes of shape before the first block; Figure 5 evaluates its accuracy."""
    return agreement(_loaded(weights, SHAPES, 0, COMMITTED / f"first-seed{seed}.safetensors"), SHAPES, 0)


@torch.no_grad()
def evaluate_avit(weights: Path, task: Task) -> dict[str, Any]:
    """A-ViT on test: right answers, and the mean cost of a picture."""
    avit, clip = AViTTower.load(weights).eval(), task.clip()
    size, saved, depth = clip.image_tower.image_size, [], []

    def encode(batch: Mapping[str, Any]) -> Tensor:
        halting = avit.run(batch["image"])
        saved.append(avit.saved_macs(halting.active)[0])
        depth.append(halting.depth)
        return halting.z

    classes = embed_prompts(clip, task.module.class_prompts)
    right = answers({"halting": encode}, task.pictures("test"), size, classes)["halting"]
    cost = gmacs(avit, size) - torch.cat(saved).mean().item() / 1e9
    return {"depth": torch.cat(depth).mean().item(), "test": {"halting": stored(right, cost)}}


def evaluate_prompts(weights: Path, task: Task, kind: str, keep: float, seed: int) -> dict[str, Any]:
    """Tuned prompts, on val at the keep rate of their tuning, and on test at every rate below 1 if that was below 1."""
    model = PromptedCLIP.load(weights).eval()
    tower, size = model.tower, model.tower.tower.image_size
    committed = (kind, keep) == ("coupled", KEEP)
    if committed and seed == 0:
        tower.prompts.save(COMMITTED / f"{task.key}_prompts.safetensors")
    towers = {str(rate): tower.at(rate) for rate in (KEEPS if keep < 1 else (keep,))}
    classes = embed_prompts(model, task.tuned_prompts)
    val = evaluate_towers({str(keep): tower}, task.pictures("val", 500), size, classes)
    result = {"val": val, "test": evaluate_towers(towers, task.pictures("test"), size, classes)}
    return result | (_losses("prompts", task, seed) if committed else {})


def _losses(kind: str, task: Task, seed: int) -> dict[str, list[float]]:
    """The first losses of the recipe, stored with its first run so that a later check can detect drift."""
    return {"first_losses": recipe_losses(kind)} if seed == 0 and task is SHAPES else {}


def recipe_losses(kind: str) -> list[float]:
    """The losses of a recipe's first steps, on one shot of each name, in the recipe's own precision.

    The first loss of prompts is 4 % less in fp32 than in bf16.
    """
    arguments = read_recipe(RECIPES[kind])["data"]["init_args"]
    data = ClassificationDataModule(**arguments | {"shots": 1, "num_workers": 0})
    return first_losses(RECIPES[kind], data=data, emulated=True)

"""Rivals that train a copy of the tower with fewer tokens, at rates that cost what Patch Ranking does; and for each of
CrossGET and DynamicViT a control with a tower that was trained alike, which tells what of a rival's accuracy is the
tower's training. ToMe merges as CrossGET does, and class attention drops where DynamicViT does. Each does so in the
untrained tower too, which tells what of its control's accuracy are the places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.patchrank.evaluate import evaluate_towers
from benchmarks.patchrank.tasks import CIFAR, FASHION, SHAPES, Task
from common.clip import CLIP
from common.reducer_registry import named, schedule
from common.reduction import ReducedTower
from common.zeroshot import embed_prompts
from patchrank.crossget import CrossGETTower
from patchrank.dynamicvit import DynamicViTTower
from patchrank.reducers.dynamicvit import stage_blocks

MERGING, MERGING_UNTRAINED = "ToMe, tower trained", "ToMe at CrossGET's blocks"
DROPPING, DROPPING_UNTRAINED = "class attention, tower trained", "class attention at DynamicViT's blocks"
UNTRAINED = {"merging_blocks": MERGING, "attention_blocks": DROPPING}
"""Controls whose tower is the task's own: their results' names, and the trained sibling with their reducer and rate."""
REDUCED = "reduced"
"""What a result calls the answers."""


@dataclass(frozen=True)
class Rival:
    """A rival that is trained.

    recipe: its kind, of ``tasks.RECIPES``.
    rates: the greatest, in hundredths, that cost no more than Patch Ranking at ``KEEP``; they mean other things than
        the share of patches that stay.
    load: weights of a training, rate -> the reduced tower.
    """

    recipe: str
    rates: Mapping[Task, float]
    load: Callable[[Path, float], nn.Module]

    def evaluate(self, weights: Path, task: Task) -> dict[str, Any]:
        """Right answers on a task's test pictures, and GMACs."""
        clip = task.clip()
        classes = embed_prompts(clip, task.module.class_prompts)
        towers = {REDUCED: self.load(weights, self.rates[task]).eval()}
        return {"test": evaluate_towers(towers, task.pictures("test"), clip.image_tower.image_size, classes)}


def _tuned_to(reducer: str, places: Callable[[int], Sequence[int]], weights: Path, keep: float) -> nn.Module:
    """The tower of a ``ReducerTuning`` with its reducer.  places: number of blocks -> the blocks at which it stands."""
    tower = CLIP.load(weights).image_tower
    return ReducedTower(tower, schedule(named(reducer), tower, keep, places(len(tower.transformer.resblocks))))


TRAINED_RIVALS = {
    "CrossGET": Rival(
        "crossget",
        {SHAPES: 0.68, CIFAR: 0.66, FASHION: 0.64},
        lambda weights, keep: CrossGETTower.load(weights).at(keep),
    ),
    MERGING: Rival(
        "reducer_tuning", {SHAPES: 0.68, CIFAR: 0.66, FASHION: 0.72}, partial(_tuned_to, "tome", lambda _: [0])
    ),
    "DynamicViT": Rival(
        "dynamicvit",
        {SHAPES: 0.74, CIFAR: 0.73, FASHION: 0.81},
        lambda weights, keep: DynamicViTTower.load(weights).at(keep),
    ),
    DROPPING: Rival(
        "attention_tuning",
        {SHAPES: 0.81, CIFAR: 0.79, FASHION: 0.89},
        partial(_tuned_to, "class-attention", stage_blocks),
    ),
}
"""By the names that tables have."""


def evaluate_untrained(task: Task, sibling: str) -> dict[str, Any]:
    """Right answers on test, and GMACs, of a control of UNTRAINED."""
    return TRAINED_RIVALS[sibling].evaluate(task.weights, task)

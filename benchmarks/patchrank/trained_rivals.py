"""Rivals that train a copy of the tower with fewer tokens, at rates that cost what Patch Ranking does; and ToMe with a
tower that was trained alike, which tells what of a rival's accuracy is the tower's training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.patchrank.evaluate import evaluate_towers
from benchmarks.patchrank.tasks import CIFAR, FASHION, SHAPES, Task
from common.clip import CLIP
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from common.zeroshot import embed_prompts
from patchrank.crossget import CrossGETTower
from patchrank.dynamicvit import DynamicViTTower

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


def _tuned_to_tome(weights: Path, keep: float) -> nn.Module:
    tower = CLIP.load(weights).image_tower
    return ReducedTower(tower, named("tome").reducers(setting_for(tower, keep, 0)))


TRAINED_RIVALS = {
    "CrossGET": Rival(
        "crossget",
        {SHAPES: 0.68, CIFAR: 0.66, FASHION: 0.64},
        lambda weights, keep: CrossGETTower.load(weights).at(keep),
    ),
    "ToMe, tower trained": Rival("reducer_tuning", {SHAPES: 0.68, CIFAR: 0.66, FASHION: 0.72}, _tuned_to_tome),
    "DynamicViT": Rival(
        "dynamicvit",
        {SHAPES: 0.74, CIFAR: 0.73, FASHION: 0.81},
        lambda weights, keep: DynamicViTTower.load(weights).at(keep),
    ),
}
"""By the names that tables have."""

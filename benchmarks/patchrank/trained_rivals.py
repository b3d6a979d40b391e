"""Rivals that train a copy of the tower to prune or merge, at rates that cost what Patch Ranking does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.patchrank.evaluate import evaluate_towers
from benchmarks.patchrank.tasks import CIFAR, FASHION, SHAPES, Task
from common.zeroshot import embed_prompts
from patchrank.crossget import CrossGETTower
from patchrank.dynamicvit import DynamicViTTower

Rival = type[CrossGETTower] | type[DynamicViTTower]
TRAINED_RIVALS: dict[str, Rival] = {"CrossGET": CrossGETTower, "DynamicViT": DynamicViTTower}
"""By the names that tables have. The names of their recipes are these in small letters."""
RATES = {
    "CrossGET": {SHAPES: 0.68, CIFAR: 0.66, FASHION: 0.64},
    "DynamicViT": {SHAPES: 0.74, CIFAR: 0.73, FASHION: 0.81},
}
"""The greatest rates, in hundredths, that cost no more than Patch Ranking at ``KEEP``; these rates are no shares of the
patches that stay."""
REDUCED = "reduced"
"""What a result calls the answers."""


def evaluate_trained(weights: Path, rival: Rival, task: Task) -> dict[str, Any]:
    """A trained rival on its task's test pictures: right answers and GMACs."""
    clip = task.clip()
    classes = embed_prompts(clip, task.module.class_prompts)
    towers = {REDUCED: rival.load(weights).eval()}
    return {"test": evaluate_towers(towers, task.pictures("test"), clip.image_tower.image_size, classes)}

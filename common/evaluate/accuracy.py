"""Accuracy with its uncertainty, of anything that turns images into scores.

Shapes: B images of a batch, M images in all, C classes, E joint dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from common.progress import bar
from common.zeroshot import similarity


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy (fractions) on M images, those of all processes.

    mean_per_class: the mean over those classes that the images show of each one's top-1.
    correct: bool [M], whether each image's first guess was right, in the loader's order.
    interval: Wilson's 95 % interval of ``top1``.
    keys: the samples' names where the batches carry them, else empty.
    """

    top1: float
    top5: float
    correct: Tensor
    interval: tuple[float, float]
    keys: tuple[str, ...] = ()
    mean_per_class: float = math.nan


@torch.no_grad()
def accuracy(
    scores: Callable[[Tensor], Tensor],
    loader: Iterable[Mapping[str, Any]],
    num_classes: int,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Accuracy:
    """Accuracy of ``scores``: images [B,3,S,S] -> [B,C], over batches with "image" and "label" (and "key").

    progress: draw a bar. With fewer than five classes ``top5`` is the accuracy over all of them. Of equal scores
    the class listed first counts as the guess.
    ValueError: no batch, a batch without labels, or a label outside [0, C).
    """
    five = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    per_class = MulticlassStatScores(num_classes, average="none").to(device)
    correct, keys = [], []
    for batch in bar(loader, "evaluating") if progress else loader:
        if "label" not in batch:
            raise ValueError(f"a batch with {sorted(batch)} has no 'label'; evaluation needs labelled pictures")
        labels = batch["label"].to(device)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit {num_classes} classes")
        guesses = scores(batch["image"].to(device)).float()
        five.update(guesses, labels)
        per_class.update(guesses, labels)
        correct.append((guesses.argmax(-1) == labels).cpu())
        keys += batch.get("key", [])
    if not correct:
        raise ValueError("the loader gave no batch; check the data path and that the split is not empty")
    right, keys = _of_all_processes(torch.cat(correct), keys)
    hits, *_, shown = per_class.compute().double().unbind(-1)
    mean_per_class = float((hits[shown > 0] / shown[shown > 0]).mean())
    interval = wilson_interval(int(right.sum()), len(right))
    return Accuracy(
        float(hits.sum() / shown.sum()), float(five.compute()), right, interval, tuple(keys), mean_per_class
    )


def _of_all_processes(correct: Tensor, keys: list[str]) -> tuple[Tensor, list[str]]:
    """What every process found, one after the other; torchmetrics gathers its own counts."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return correct, keys
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (correct, keys))
    return torch.cat([part for part, _ in found]), [key for _, part in found for key in part]


def zero_shot(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    classes: Tensor,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Accuracy:
    """Zero-shot accuracy of a model with ``encode_image`` against class embeddings [C,E]; see ``accuracy``.

    The model is moved to ``device`` and evaluated in evaluation mode, which is restored.
    """
    training = model.training
    model.to(device).eval()
    try:
        return accuracy(
            lambda images: similarity(model.encode_image(images), classes),
            loader,
            len(classes),
            device,
            progress,
        )
    finally:
        model.train(training)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927), which stays within [0, 1].

    ValueError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is not a proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def paired_difference(
    first: Tensor, second: Tensor, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of ``first`` minus that of ``second``, both bool [M] in one order -> (difference, low, high).

    Percentile bootstrap over images. A resample matters only through how many images each model alone gets
    right, and those counts are multinomial, so they are drawn as such: the same distribution in one draw.
    ValueError: different or no images.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"shapes {tuple(first.shape)} and {tuple(second.shape)} differ; give one bool per image")
    total = len(first)
    gains, losses = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([gains, losses, total - gains - losses]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (gains - losses) / total, float(low), float(high)

"""Accuracy with its uncertainty, for any function from images to class scores.

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

from common.progress import bar
from common.zeroshot import similarity


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy (fractions) on the M images of all processes.

    mean_per_class: top-1 per class, averaged over the classes present.
    correct: bool [M], whether the top guess for each image is right, in the loader's order.
    interval: Wilson's 95 % interval of ``top1``.
    keys: the samples' names, or empty if the batches have none.
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

    progress: draw a bar.
    Among equal scores, the class listed first is the guess. With fewer than five classes, ``top5`` is 1.
    ValueError: no batch, a batch without labels, a label outside [0, C), or a score that is not a number.
    """
    correct, among_five, shown, keys = [], [], [], []
    for batch in bar(loader, "evaluating") if progress else loader:
        if "label" not in batch:
            raise ValueError(f"a batch with {sorted(batch)} has no 'label'; evaluation needs labelled pictures")
        labels = batch["label"].to(device)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit {num_classes} classes")
        logits = scores(batch["image"].to(device)).float()
        if logits.isnan().any():
            raise ValueError("a score is not a number; evaluate in float32, and check the weights")
        best = logits.topk(min(5, num_classes)).indices
        correct.append((logits.argmax(-1) == labels).cpu())
        among_five.append((best == labels[:, None]).any(-1).cpu())
        shown.append(labels.cpu())
        keys += batch.get("key", [])
    if not correct:
        raise ValueError("the loader gave no batch; check the data path and that the split is not empty")
    right, five, labels, keys = _of_all_processes(*map(torch.cat, (correct, among_five, shown)), keys)
    samples, hits = (torch.bincount(part, minlength=num_classes).double() for part in (labels, labels[right]))
    present = samples > 0
    return Accuracy(
        top1=right.double().mean().item(),
        top5=five.double().mean().item(),
        correct=right,
        interval=wilson_interval(int(right.sum()), len(right)),
        keys=tuple(keys),
        mean_per_class=(hits[present] / samples[present]).mean().item(),
    )


def _of_all_processes(
    correct: Tensor, among_five: Tensor, labels: Tensor, keys: list[str]
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """The results for the images of all processes, in rank order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return correct, among_five, labels, keys
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, (correct, among_five, labels, keys))
    *columns, all_keys = zip(*parts, strict=True)
    return *map(torch.cat, columns), [key for keys in all_keys for key in keys]


def zero_shot(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    classes: Tensor,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Accuracy:
    """Zero-shot accuracy of a model with ``encode_image`` against class embeddings [C,E]; see ``accuracy``.

    The model is moved to ``device`` and runs in evaluation mode; its mode is restored.
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
    """Accuracy of ``first`` minus that of ``second``, both bool [M] over the same images -> (difference, low, high).

    Percentile bootstrap over images. The difference depends only on two counts: the images that only the first model
    gets right, and those that only the second does. In a resample these counts are multinomial, so each resample
    is one multinomial draw.
    ValueError: the two have different shapes, or no images.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"shapes {tuple(first.shape)} and {tuple(second.shape)} differ; give one bool per image")
    total = len(first)
    gains, losses = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([gains, losses, total - gains - losses]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (gains - losses) / total, float(low), float(high)

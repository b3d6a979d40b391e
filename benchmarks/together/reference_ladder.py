"""The reference ladder: what chance and colours alone tell of a benchmark's names, below what its CLIPs tell.

An MLP on a histogram knows nothing about places. Where it comes near the teacher, the benchmark measures colours.

Shapes: M pictures, H height, W width, K bins of a histogram, S training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import cells
from benchmarks.statistics import mean_interval
from common.clip import CLIP
from common.data.transforms import to_batch
from common.zeroshot import embed_prompts

CHANCE, RGB, GREY = "chance", "RGB histogram, MLP", "grey histogram, MLP"
HALF, FULL, FULL_IN_GREY = "half-resolution tower", "teacher", "teacher, grey pictures"
ROWS = (CHANCE, RGB, GREY, HALF, FULL, FULL_IN_GREY)
TRAINED_ON, EPOCHS, WIDTH, BATCH = 20_000, 30, 512, 256
"""Pictures of train that a histogram's MLP learns from, its epochs, hidden units and batch size."""
BINS, _LEVELS = 216, 6  # six levels of each channel, or 216 of the luminance
Labelled = tuple[Sequence[np.ndarray], Tensor]
"""Pictures, uint8 [H,W,3] each, and their labels [M]."""


def without_training(names: int, known: Labelled, shown: Labelled) -> list[dict[str, Any]]:
    """The rows of chance and of both histograms, whose MLPs learn from ``known`` and answer for ``shown``."""
    rows: list[dict[str, Any]] = [{"row": CHANCE, "accuracy": 1 / names}]
    for row, features in ((RGB, colour_histogram), (GREY, grey_histogram)):
        rows.append(measured(row, [_mlp_right(features, known, shown)]))
    return rows


def measured(row: str, correct: Sequence[Tensor]) -> dict[str, Any]:
    """A row with its accuracy and interval. correct: bool [M] of each training seed."""
    middle, low, high = mean_interval(torch.stack(list(correct)).numpy()).ends
    return {"row": row, "accuracy": middle, "interval": [low, high]}


def cell(row: dict[str, Any]) -> str:
    """A row's accuracy with its interval, or the command that trains its model."""
    if "command" in row:
        return f"not run: `{row['command']}`"
    if "interval" not in row:
        return f"{100 * row['accuracy']:.1f}"
    return cells.accuracy(row["accuracy"], row["interval"])


def grey(picture: np.ndarray) -> np.ndarray:
    """A picture's luminance in all three channels, uint8 [H,W,3]."""
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def colour_histogram(picture: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 216 colours, [K], of a picture uint8 [H,W,3]."""
    red, green, blue = np.moveaxis(picture.astype(int) * _LEVELS // 256, -1, 0)
    return _root_shares((red * _LEVELS + green) * _LEVELS + blue)


def grey_histogram(picture: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 216 luminances, [K], of a picture uint8 [H,W,3]."""
    return _root_shares(grey(picture)[..., 0].astype(int) * BINS // 256)


def _root_shares(bins: np.ndarray) -> np.ndarray:
    return np.sqrt(np.bincount(bins.ravel(), minlength=BINS) / bins.size)


@torch.enable_grad()
def train_mlp(features: Tensor, labels: Tensor, epochs: int = EPOCHS) -> nn.Module:
    """A classifier with one hidden layer, trained on features [M,K] with labels [M] by cross-entropy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = [nn.LayerNorm(features.shape[1]), nn.Linear(features.shape[1], WIDTH), nn.ReLU(), nn.Dropout(0.3)]
        mlp = nn.Sequential(*hidden, nn.Linear(WIDTH, int(labels.max()) + 1))
        optimizer = torch.optim.AdamW(mlp.parameters(), weight_decay=0.01)
        steps = epochs * -(-len(labels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(epochs):
            for part in torch.randperm(len(labels)).split(BATCH):
                loss = nn.functional.cross_entropy(mlp(features[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return mlp.eval()


@torch.no_grad()
def named_right(clip: CLIP, shown: Sequence[np.ndarray], labels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether a CLIP names each picture rightly among the prompts of all classes, bool [M]."""
    classes = embed_prompts(clip, prompts)
    batches = (to_batch(shown[start : start + BATCH], clip.preprocess) for start in range(0, len(shown), BATCH))
    return torch.cat([(clip.encode_image(images) @ classes.T).argmax(-1) for images in batches]) == labels


def _mlp_right(features: Callable[[np.ndarray], np.ndarray], known: Labelled, shown: Labelled) -> Tensor:
    """Whether an MLP on the features of ``known`` names each picture of ``shown`` rightly, bool [M]."""
    train, val = (torch.from_numpy(np.stack([features(p) for p in images])).float() for images, _ in (known, shown))
    return train_mlp(train, known[1])(val).argmax(-1) == shown[1]

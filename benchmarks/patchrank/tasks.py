"""The tasks of Patch Ranking's embedded tables, and right answers as result files keep them.

Shapes: B images, M images in all, S seeds, C classes, E joint dim.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks import WEIGHTS
from benchmarks.embedded import TEACHER
from common.clip import CLIP
from common.data.classification import ClassificationSet
from common.data.classification_module import ClassificationDataModule
from common.data.pictures import loader
from common.evaluate.accuracy import wilson_interval
from common.zeroshot import fill, similarity
from patchrank.scores import keep_count

PICTURES = 4000
"""Test pictures of a task at most, the first ones."""
PRUNE_LAYER = 1
"""Block 1 of the embedded tower's 4: a quarter of the depth, as block 3 of 12. Of Fashion-MNIST's 3 it is a third."""
SEEDS = (0, 1, 2)
RECIPES = {kind: f"patchrank/embedded_{kind}.yaml" for kind in ("predictor", "avit", "prompts")}
COMMITTED, FOR_ALL = WEIGHTS / "patchrank", WEIGHTS / "embedded_patchrank.safetensors"
"""The folder of committed predictors and prompts, and the predictor for all embedded tasks, which others use too."""
KEEP, KEEPS = 0.6, (0.9, 0.8, 0.7, 0.6, 0.5)
_BATCH = 250


def search(tokens: int) -> dict[str, int]:
    """The greedy search behind every golden ranking of N patch tokens here: three rounds of a sixth of them.

    Half of them are gone after the last. The embedding loses less than by a ranking in one shot, at twice the cost.
    """
    return {"rounds": 3, "removed_per_round": tokens // 6}


def pruned_depth(tokens: int, layers: int) -> float:
    """How many of a tower's blocks a token goes through on average when the predictor prunes N patch tokens here."""
    kept = (1 + keep_count(KEEP, tokens)) / (1 + tokens)
    return round(PRUNE_LAYER + (layers - PRUNE_LAYER) * kept, 1)


@dataclass(frozen=True)
class Task:
    """A task by the name that tables show.

    data: by the name under which ``common.data.lookup`` finds it.  architecture, weights: of its CLIP.
    shots: of each class, that predictor and A-ViT learn from, which need no labels; prompts always have 16.
    held_out: training pictures that validate, where the data has no val split.
    words, template: what the text prompts start as, and the class prompt that follows them.
    """

    name: str
    data: str
    architecture: str = "common/embedded_clip.json"
    weights: Path = TEACHER
    shots: int = 16
    held_out: int | None = None
    words: str = "a small"
    template: str = "{}"

    def missing(self) -> str | None:
        """What is not there that the task needs, or None."""
        if not self.weights.is_file():
            return f"no weights benchmarks/weights/{self.weights.name}"
        return "EFFCLIP_DATA is not set" if not self.drawn and not os.environ.get("EFFCLIP_DATA") else None

    @property
    def drawn(self) -> bool:
        """Whether the suite draws the pictures itself."""
        return self.data.startswith("embedded-")

    def clip(self) -> CLIP:
        """The task's CLIP, frozen."""
        return CLIP.load(self.weights).eval().requires_grad_(False)

    @property
    def module(self) -> ClassificationDataModule:
        """The data, read once in a process."""
        return _module(self)

    @property
    def tuned_prompts(self) -> list[str]:
        """One text a class, as tuned text prompts precede it."""
        return [fill(self.template, name) for name in self.module.class_names]

    def pictures(self, split: str, count: int = PICTURES) -> ClassificationSet:
        """The first pictures of "val" or "test"."""
        found = getattr(self.module, f"{split}_pictures")
        return found if len(found) <= count else found.subset(range(count))


@cache
def _module(task: Task) -> ClassificationDataModule:
    settings = {"shots": 1, "held_out": task.held_out, "captions": False, "num_workers": 0}
    return ClassificationDataModule(task.data, task.architecture, **settings)


STYLES = tuple(Task(name, f"embedded-{name}") for name in ("sketch", "colour", "blur"))
FASHION = Task(
    "Fashion-MNIST",
    "fashion_mnist",
    "common/fashion_mnist_clip.json",
    WEIGHTS / "fashion_mnist_clip.safetensors",
    shots=160,
    held_out=5000,
    words="a photo",
    template="of a {}.",
)
TASKS = (*STYLES, FASHION)
PLAIN = Task("plain", "embedded-plain", shots=4)
"""All seen names in the style of pretraining: what is trained once and carried over."""


Encoder = Callable[[Mapping[str, Any]], Tensor]
"""A batch of ``common.data.pictures.loader`` -> embeddings [B,E]."""


@torch.no_grad()
def answers(
    encoders: Mapping[str, Encoder], pictures: ClassificationSet, image_size: int, classes: Tensor
) -> dict[str, Tensor]:
    """For each encoder, whether it names each picture rightly among classes [C,E]: bool [M], in one pass over them."""
    right: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in track(loader(pictures, image_size, _BATCH), "evaluating"):
        for name, encode in encoders.items():
            right[name].append(similarity(encode(batch), classes).argmax(-1) == batch["label"])
    return {name: torch.cat(parts) for name, parts in right.items()}


def stored(correct: Tensor, gmacs: float) -> dict[str, Any]:
    """Right answers, bool [M], as a result keeps them: every single one, packed, what they come to, and their cost."""
    right, pictures = int(correct.sum()), len(correct)
    packed = base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
    interval = wilson_interval(right, pictures)
    return {"accuracy": right / pictures, "interval": interval, "pictures": pictures, "gmacs": gmacs, "correct": packed}


def restored(found: Mapping[str, Any]) -> Tensor:
    """The right answers, bool [M], that ``stored`` kept."""
    packed = np.frombuffer(base64.b64decode(found["correct"]), np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=found["pictures"]).astype(bool))


def paired(first: Sequence[Tensor], second: Sequence[Tensor], resamples: int = 10_000) -> tuple[float, float, float]:
    """Accuracy of ``first`` minus that of ``second``, each one tensor [S,M] a task -> (difference, low, high).

    The mean over tasks, of the mean over training seeds; 95 % percentile bootstrap over each task's pictures, which
    both sides share, the seeds being those that there are. A resample matters only through how often it draws each
    value of the difference, so those numbers are drawn: the same distribution in one draw.
    """
    rng, draws, means = np.random.default_rng(0), [], []
    for ours, theirs in zip(first, second, strict=True):
        differences = (ours.double().mean(0) - theirs.double().mean(0)).numpy().round(9)
        values, counts = np.unique(differences, return_counts=True)
        drawn = rng.multinomial(len(differences), counts / len(differences), size=resamples)
        draws.append(drawn @ values / len(differences))
        means.append(differences.mean())
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)

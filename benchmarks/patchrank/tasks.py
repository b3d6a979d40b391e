"""The tasks of Patch Ranking's embedded tables, and how result files store which answers are right.

Shapes: B images of a batch, M images in all, C classes, E joint dim.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks import WEIGHTS
from benchmarks.cells import accuracy_of
from common.clip import CLIP
from common.data.classification import ClassificationSet
from common.data.classification_module import ClassificationDataModule
from common.data.pictures import loader
from common.preprocess import Preprocess
from common.zeroshot import fill, similarity
from patchrank.scores import keep_count

PICTURES = 3000
"""A task is tested on so many of its test pictures at most, see ``Task.chosen``."""
SEARCHED = 250
"""On so many of those the oracle's stronger search runs, which takes half a second a picture."""
PRUNE_LAYER = 1
"""Block 1 of a tower of 4 is a quarter of the depth, as block 3 of 12 is; of Fashion-MNIST's 3, a third."""
SEEDS = (0, 1, 2)
_KINDS = ("predictor", "prompts", "avit", "crossget", "reducer_tuning", "dynamicvit", "attention_tuning")
RECIPES = {kind: f"patchrank/embedded_{kind}.yaml" for kind in _KINDS}
COMMITTED = WEIGHTS / "patchrank"
"""The folder of committed predictors and prompts."""
CIFAR_10_ATTRIBUTION = "Trained on the training pictures of CIFAR-10 (A. Krizhevsky, 2009)."
"""The line that weights trained on CIFAR-10 carry."""
KEEP, KEEPS = 0.6, (0.9, 0.8, 0.7, 0.6, 0.5)
_BATCH = 250


def search(tokens: int) -> dict[str, int]:
    """Arguments of the greedy search for a golden ranking of N patch tokens: each of three rounds removes a sixth.

    The embedding loses less than by a ranking in one shot, at twice the cost.
    """
    return {"rounds": 3, "removed_per_round": tokens // 6}


def pruned_depth(tokens: int, layers: int) -> float:
    """Mean number of blocks that a token passes when N patch tokens are pruned at KEEP before PRUNE_LAYER."""
    kept = (1 + keep_count(KEEP, tokens)) / (1 + tokens)
    return round(PRUNE_LAYER + (layers - PRUNE_LAYER) * kept, 1)


@dataclass(frozen=True)
class Task:
    """A classification task with its CLIP.

    name: as tables show it.  data: the data set's name in ``common.data.lookup``.
    architecture, weights: those of the CLIP.
    logged: the data's name in the log of reads of test.
    shots: pictures of each class for predictors and the trained rivals; prompts always have 16.
    held_out: training pictures used for validation, where the data set has no val split.
    variable: the environment variable that says where the pictures are; None: the suite draws them.
    folder: whether the variable names the pictures' own folder, of classes in folders; else that of all data sets.
    words, template: the words that text prompts start from (None: at random), and the class prompt that follows them.
    """

    name: str
    data: str
    architecture: str
    weights: Path
    logged: str
    shots: int = 4
    held_out: int | None = None
    variable: str | None = None
    folder: bool = False
    words: str | None = "a medium"
    template: str | None = "{}"

    @property
    def key(self) -> str:
        """The name as files have it."""
        return self.name.lower()

    @property
    def place(self) -> str:
        """The data as this machine reads it: a folder's path, where the task has one of its own."""
        named = os.environ.get(self.variable) if self.folder else None
        return str(Path(named).expanduser().absolute()) if named else self.data

    def missing(self) -> str | None:
        """What the task needs and does not have, or None."""
        if not self.weights.is_file():
            return f"no weights benchmarks/weights/{self.weights.name}"
        if self.variable is None:
            return None
        if not os.environ.get(self.variable):
            return f"{self.variable} is not set"
        if self.folder and name_of_folder(self.place) != self.data:
            return f"{self.variable} names no folder {self.data}"
        return None

    def clip(self) -> CLIP:
        """The task's CLIP, frozen."""
        return CLIP.load(self.weights).eval().requires_grad_(False)

    @property
    def module(self) -> ClassificationDataModule:
        """The data, read once a process."""
        return _module(self)

    @property
    def tuned_prompts(self) -> list[str]:
        """The text of each class that follows the tuned text prompts."""
        if self.template is None:
            return self.module.class_prompts
        return [fill(self.template, name) for name in self.module.class_names]

    def pictures(self, split: str, count: int = PICTURES) -> ClassificationSet:
        """So many pictures of "val" or "test", see ``chosen``."""
        pictures = getattr(self.module, f"{split}_pictures")
        return pictures.subset(self.chosen(len(pictures), count)) if count < len(pictures) else pictures

    def chosen(self, whole: int, count: int) -> list[int]:
        """So many indices below ``whole``, such that all classes are among them.

        Drawn pictures have their names in turn, so the first ones serve; a steady step would meet a few names alone.
        The classes of a folder follow one another, so there the step is steady.
        """
        return list(range(count)) if self.variable is None else [index * whole // count for index in range(count)]


def name_of_folder(path: str) -> str:
    """A folder's own name in small letters and digits."""
    return "".join(filter(str.isalnum, Path(path).name.lower()))


@cache
def _module(task: Task) -> ClassificationDataModule:
    settings = {"shots": 1, "held_out": task.held_out, "captions": False, "num_workers": 0}
    return ClassificationDataModule(task.place, task.architecture, **settings)


SHAPES = Task(
    "shapes", "embedded-shapes", "common/shapes_clip.json", WEIGHTS / "shapes_clip.safetensors", "embedded-shapes"
)
CIFAR = Task(
    "CIFAR-10",
    "cifar10",
    "common/cifar10_clip.json",
    WEIGHTS / "photos_cifar10_clip.safetensors",
    "photos-cifar10",
    shots=100,
    variable="PHOTOS",
    folder=True,
    words=None,
    template=None,
)
FASHION = Task(
    "Fashion-MNIST",
    "fashion_mnist",
    "common/fashion_mnist_clip.json",
    WEIGHTS / "fashion_mnist_clip.safetensors",
    "fashion-mnist",
    shots=100,
    held_out=5000,
    variable="EFFCLIP_DATA",
    words=None,
    template=None,
)
TASKS = (SHAPES, CIFAR, FASHION)

Encoder = Callable[[Mapping[str, Any]], Tensor]
"""A batch of ``common.data.pictures.loader`` -> embeddings [B,E]."""


@torch.no_grad()
def answers(
    encoders: Mapping[str, Encoder], pictures: ClassificationSet, image_size: int, classes: Tensor
) -> dict[str, Tensor]:
    """Which pictures each encoder classifies correctly among classes [C,E]: bool [M]. All encoders share one pass."""
    right: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in track(loader(pictures, Preprocess(image_size), _BATCH), "evaluating"):
        for name, encode in encoders.items():
            right[name].append(similarity(encode(batch), classes).argmax(-1) == batch["label"])
    return {name: torch.cat(parts) for name, parts in right.items()}


def stored(correct: Tensor, gmacs: float) -> dict[str, Any]:
    """What a result file stores of right answers, bool [M]: their bits, the accuracy, and the GMACs of a picture."""
    packed = base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
    return accuracy_of(correct) | {"pictures": len(correct), "gmacs": gmacs, "correct": packed}


def restored(entry: Mapping[str, Any]) -> Tensor:
    """The right answers, bool [M], of an entry that ``stored`` made."""
    packed = np.frombuffer(base64.b64decode(entry["correct"]), np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=entry["pictures"]).astype(bool))

"""Few-shot tasks of the embedded benchmark: a hundred names each, in a style that pretraining never showed.

Three tasks have names of their own, all of them seen in pretraining, and one shift of style each, such that a CLIP of
plain pictures still knows about half of theirs: pencil lines, turned hues, blur. A fourth, "plain", is every seen name
in the benchmark's own style, for what is trained once on much data and carried over. Pictures are
``common.data.embedded.scenes`` (revision 1), drawn when they are asked for, the same ones every time. "shapes" is
"plain" of revision 2; no split of that revision holds its pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from types import ModuleType

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from common.data.classification import ClassificationSet
from common.data.embedded import scenes, shapes
from common.data.embedded.splits import recipe_hash
from common.data.embedded.twemoji import CANVAS, TEMPLATES, VIEW
from common.data.sources import Samples

NAMES = 100
PER_NAME = {"train": 16, "val": 4, "test": 40}
"""Pictures of each name by split."""
REVISION = 2  # counts changes of the styles below


def sketch(picture: Image.Image) -> Image.Image:
    """A pencil sketch, dark outlines on white, laid over the picture."""
    edges = ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES)
    inner = ImageOps.crop(edges, 1)  # the filter leaves the border as it was
    lines = ImageOps.expand(ImageOps.invert(ImageOps.autocontrast(inner, cutoff=(0, 1))), 1, 255).convert("RGB")
    return Image.blend(picture, lines, 0.2)


def colour(picture: Image.Image) -> Image.Image:
    """Every hue turned by 17 degrees; lightness and shape stay about as they were."""
    hue, *others = picture.convert("HSV").split()
    return Image.merge("HSV", [hue.point(lambda value: (value + 12) % 256), *others]).convert("RGB")


def blur(picture: Image.Image) -> Image.Image:
    """A Gaussian blur as wide as the details that tell the names apart."""
    return picture.filter(ImageFilter.GaussianBlur(1.75))


STYLES = {"sketch": sketch, "colour": colour, "blur": blur}
TASKS = (*STYLES, "plain", "shapes")


def drawing(task: str) -> ModuleType:
    """The revision of the scenes that a task shows."""
    return shapes if task == "shapes" else scenes


def task_labels(task: str) -> list[int]:
    """The labels of a task's names, places in ``class_names("seen")``; the three styles share none.

    ValueError: no such task.
    """
    if task not in TASKS:
        raise ValueError(f"the embedded tasks are {', '.join(TASKS)}, not {task!r}")
    labels = list(range(len(drawing(task).class_names("seen"))))
    if task not in STYLES:
        return labels
    Random("names of the tasks").shuffle(labels)
    first = NAMES * list(STYLES).index(task)
    return sorted(labels[first : first + NAMES])


@lru_cache(maxsize=20_000)  # at most 140 MB
def draw(task: str, split: str, index: int) -> np.ndarray:
    """Picture ``index`` of a task's split, uint8 [VIEW,VIEW,3]; the names come in turn."""
    labels = task_labels(task)
    rng = Random(f"{task}/{split}/{index}")
    drawn = drawing(task).draw_scene(rng, labels[index % len(labels)], labels).render()
    styled = STYLES[task](drawn) if task in STYLES else drawn
    return np.asarray(ImageOps.crop(styled, (CANVAS - VIEW) // 2))


class _Drawn(Sequence):
    """The pictures of a split, each drawn when it is first looked at."""

    def __init__(self, task: str, split: str, count: int) -> None:
        self.task, self.split, self.count = task, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:  # what ends an iteration
            raise IndexError(f"picture {index} of {self.count}")
        return draw(self.task, self.split, index)


def embedded_task(task: str, split: str = "test") -> ClassificationSet:
    """A split of a task, labelled by places in its own list of names. ValueError: no such task or split."""
    labels = task_labels(task)
    if split not in PER_NAME:
        raise ValueError(f"the embedded tasks have the splits {list(PER_NAME)}, not {split!r}")
    count = PER_NAME[split] * len(labels)
    seen = drawing(task).class_names("seen")
    names = [seen[label] for label in labels]
    samples = Samples(_Drawn(task, split, count), [index % len(labels) for index in range(count)], names)
    return ClassificationSet(samples, "embedded", names, TEMPLATES, prefix=f"{task}-{split}-")


def version() -> str:
    """Changes when any task's pictures do."""
    text = json.dumps([recipe_hash(revision=1), recipe_hash(revision=2), REVISION, NAMES, PER_NAME])
    return hashlib.sha256(text.encode()).hexdigest()[:12]

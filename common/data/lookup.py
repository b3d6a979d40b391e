"""What can be evaluated on, by name, task and split: labelled pictures, and pictures with captions.

Shapes: B images, S image size, M images in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.data.embedded import TEMPLATES, VIEW, EmbeddedDataModule, class_names, indices, recipe_hash, scene
from common.data.transforms import Transform, center_view
from common.zeroshot import Template

Loader = Callable[[int, int, int], Iterable[Mapping[str, Any]]]
"""(S, batch size, worker processes) -> batches {"image": float [B,3,S,S], "key": list[str]}, perhaps with labels.

Every picture comes once, normalised by CLIP's mean and deviation.
"""

SPLITS: dict[str, dict[str, tuple[str, ...]]] = {
    "embedded": {
        "zeroshot": ("test", "val", "unseen", "unseen-alone"),
        "retrieval": ("retrieval",),
        "linear-probe": ("test",),
        "training": ("train", "val"),
    },
}
"""Data set -> task -> its splits, the default one first; "training" is what a linear probe learns from."""


@dataclass(frozen=True)
class Labelled:
    """Pictures of classes; the batches carry "label": long [B], places in ``class_names``.

    templates: prompts for the names, see ``common.zeroshot.Template``.
    metric: "accuracy" or "mean_per_class", the one that papers print.
    scale: "paper" or "embedded".  version: what changes when the pictures do.
    """

    split: str
    class_names: Sequence[str]
    templates: Sequence[Template]
    metric: str
    loader: Loader
    scale: str = "paper"
    version: str = ""


@dataclass(frozen=True)
class Captioned:
    """Pictures with one or more captions each: M lists, in the order in which ``loader`` gives the pictures."""

    split: str
    captions: Sequence[Sequence[str]]
    loader: Loader
    scale: str = "paper"
    version: str = ""


def splits_of(name: str, task: str) -> tuple[str, ...]:
    """The splits of a data set for a task, the default one first. ValueError: no such data, or not for this task."""
    if name not in SPLITS:
        raise ValueError(f"no data called {name!r}; there are {sorted(SPLITS)}")
    if task not in SPLITS[name]:
        raise ValueError(f"{name} has no pictures for {task!r}; it has them for {sorted(SPLITS[name])}")
    return SPLITS[name][task]


def source(name: str, task: str, split: str | None = None) -> Labelled | Captioned:
    """The pictures of a split for a task of ``SPLITS`` (None: its default split), Captioned for "retrieval".

    ValueError: no such data, task or split; it names those that there are.
    """
    splits = splits_of(name, task)
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r} for {task}; it has {list(splits)}")
    return _embedded_captions(split) if task == "retrieval" else _embedded_classes(split)


class _Pictures(EmbeddedDataModule):
    """The embedded benchmark without texts, at any picture size."""

    def __init__(self, image_size: int, batch_size: int, workers: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=workers)
        self.captions, self.image_size = False, image_size

    def picture_transform(self, train: bool) -> Transform:
        """The stored picture's central view."""
        return partial(center_view, image_size=self.image_size, view=VIEW)


def _embedded_classes(split: str) -> Labelled:
    """A labelled split of the embedded benchmark.

    "train", "val" and "test" show the seen names and are scored among them. "unseen" shows the held-out names,
    scored among all names; "unseen-alone" are the same pictures, scored among the held-out names.
    """
    names = class_names({"unseen": "all", "unseen-alone": "unseen"}.get(split, "seen"))
    first = len(class_names("seen")) if split == "unseen-alone" else 0

    def loader(image_size: int, batch_size: int, workers: int) -> Iterable[Mapping[str, Any]]:
        batches = _Pictures(image_size, batch_size, workers).dataloader(split.removesuffix("-alone"), train=False)
        return ({**batch, "label": batch["label"] - first} for batch in batches) if first else batches

    return Labelled(split, names, TEMPLATES, "accuracy", loader, "embedded", recipe_hash())


def _embedded_captions(split: str) -> Captioned:
    """Pictures of the embedded benchmark with their one caption each, which no other picture has."""

    def loader(image_size: int, batch_size: int, workers: int) -> Iterable[Mapping[str, Any]]:
        # Several readers would interleave their shards; one keeps the order.
        return _Pictures(image_size, batch_size, min(workers, 1)).dataloader(split, train=False)

    captions = [[scene(split, index)[1]] for index in indices(split)]
    return Captioned(split, captions, loader, "embedded", recipe_hash())

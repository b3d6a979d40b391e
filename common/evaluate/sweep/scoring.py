"""What a sweep scores at each of its points: the tasks of `effclip evaluate`, on pictures that are read once.

Shapes: B images of a batch, M images in all, E joint dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.evaluate.accuracy import Accuracy
from common.evaluate.points import Classes, Point
from common.evaluate.prompts import prompts_hash, value_hash
from common.evaluate.sweep.journal import Record
from common.evaluate.sweep.pictures import Pictures, packed
from common.evaluate.tasks import (
    Settings,
    accuracies,
    classes_of,
    embedded_captions,
    embedded_pictures,
    encoder,
    observed,
    probed,
    retrieved,
    runner,
    train_and_val,
)
from common.models import Model
from common.zeroshot import Template

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Passes batches on, and shows where it is."""


class Scoring(ABC):
    """How the points of a sweep are scored on one split.

    column, label: the main metric's, a fraction; of it are the intervals, the differences, and the choice in a budget.
    others: the columns of further metrics.
    beside: {label: column} of those that a table shows, with an interval in COLUMN_low and COLUMN_high.
    classes: those against which pictures are scored; None: they are not.
    """

    task: ClassVar[str]
    column: ClassVar[str] = "top1"
    label: ClassVar[str] = "top-1"
    others: ClassVar[tuple[str, ...]] = ("top5", "mean_per_class")
    beside: ClassVar[dict[str, str]] = {}

    def __init__(self, model: Model, pictures: Pictures, settings: Settings) -> None:
        self.model, self.pictures, self.settings = model, pictures, settings
        self.classes: Classes | None = None

    @property
    @abstractmethod
    def version(self) -> str:
        """A hash of all that the scores depend on beside model and setting: pictures, names, prompts, captions."""

    @abstractmethod
    def sentence(self, samples: int) -> str:
        """What the main metric is."""

    def run(self, images: nn.Module, point: Point) -> Callable[[Tensor], Any]:
        """The image side at a point, as a function of images [B,3,S,S]; it is what is timed."""
        return encoder(replace(self.model, images=images), self.settings)

    @abstractmethod
    def __call__(self, run: Callable[[Tensor], Any], progress: Progress) -> Record:
        """The scores of a ``run``: "samples", "interval" (Wilson's, 95 %), "correct" (see ``packed``), all columns.

        "exits": the share of the images on each path, where there are several.
        """


class ZeroShot(Scoring):
    """Zero-shot accuracy by class names in templates."""

    task = "zeroshot"

    def __init__(self, model: Model, pictures: Pictures, settings: Settings, templates: Sequence[Template]) -> None:
        super().__init__(model, pictures, settings)
        self.templates = templates
        self.classes = partial(classes_of, model, pictures.data.class_names, templates, settings)

    @property
    def version(self) -> str:
        data = self.pictures.data
        return value_hash([self.pictures.version, data.class_names, prompts_hash(self.templates, data.class_names)])

    def sentence(self, samples: int) -> str:
        names, split = len(self.pictures.data.class_names), self.pictures.data.split
        return f"Zero-shot top-1 among {names:,} names, {samples:,} pictures of {split}"

    def run(self, images: nn.Module, point: Point) -> Callable[[Tensor], Any]:
        settings = replace(self.settings, threshold=point.threshold)
        return runner(replace(self.model, images=images), self.pictures.data.class_names, self.templates, settings)

    def __call__(self, run: Callable[[Tensor], Any], progress: Progress) -> Record:
        classes = len(self.pictures.data.class_names)
        result, exits = observed(run, progress(self.pictures), classes, self.settings.device)
        return _accuracies(result) | {"exits": exits}


class Retrieval(Scoring):
    """Image-text retrieval; the main metric is R@1 from images to texts. Captions are embedded once."""

    task = "retrieval"
    column, label = "image_to_text_r1", "image to text R@1"
    others = (
        *("image_to_text_r5", "image_to_text_r10", "text_to_image_r1", "text_to_image_r5", "text_to_image_r10"),
        *("text_to_image_r1_low", "text_to_image_r1_high", "texts"),
    )
    beside: ClassVar = {"text to image R@1": "text_to_image_r1"}
    _texts: Tensor | None = None

    @property
    def version(self) -> str:
        return value_hash([self.pictures.version, self.pictures.data.captions])

    def sentence(self, samples: int) -> str:
        return f"R@1 among the captions of {samples:,} pictures of {self.pictures.data.split}, and back"

    def __call__(self, run: Callable[[Tensor], Any], progress: Progress) -> Record:
        captions = self.pictures.data.captions[: self.settings.limit]
        images = torch.cat([run(batch["image"]) for batch in progress(self.pictures)])
        if self._texts is None:
            self._texts = embedded_captions(self.model, captions, self.settings)
        metrics, correct = retrieved(images, captions, self._texts)
        sides = ("image_to_text", "text_to_image")
        recalls = {f"{side}_r{k}": metrics[side][f"R@{k}"] for side in sides for k in (1, 5, 10)}
        low, high = metrics["text_to_image"]["interval"]
        ends = {"text_to_image_r1_low": low, "text_to_image_r1_high": high}
        main = {"interval": metrics["image_to_text"]["interval"], "correct": packed(correct)}
        return {"samples": metrics["samples"], "texts": metrics["texts"], **recalls, **ends, **main}


class LinearProbe(Scoring):
    """A linear probe on the embeddings of all training pictures, which every point embeds anew.

    training: pictures of "train", and perhaps of "val", on which the penalty is chosen.
    """

    task = "linear-probe"
    label = "top-1 of a linear probe"

    def __init__(self, model: Model, pictures: Pictures, settings: Settings, training: Mapping[str, Pictures]) -> None:
        super().__init__(model, pictures, settings)
        self.training = training

    @property
    def version(self) -> str:
        names = self.pictures.data.class_names
        learned = {part: pictures.version for part, pictures in self.training.items()}
        return value_hash([self.pictures.version, names, learned])

    def sentence(self, samples: int) -> str:
        names, split = len(self.pictures.data.class_names), self.pictures.data.split
        return f"Top-1 of a linear probe among {names:,} names, {samples:,} pictures of {split}"

    def __call__(self, run: Callable[[Tensor], Any], progress: Progress) -> Record:
        def embedded(pictures: Pictures) -> tuple[Tensor, Tensor]:
            return embedded_pictures(run, progress(pictures), self.settings)

        val = embedded(self.training["val"]) if "val" in self.training else None
        train, val = train_and_val(embedded(self.training["train"]), val)
        classes = len(self.pictures.data.class_names)
        return _accuracies(probed(train, val, embedded(self.pictures), classes, self.settings)[0])


def _accuracies(result: Accuracy) -> Record:
    return accuracies(result) | {"correct": packed(result.correct)}

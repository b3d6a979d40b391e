"""A zero-shot classification among fixed labels at a fixed setting, and its answers.

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from common.data.files import Picture, read_ahead
from common.data.transforms import to_batch, views_transform

if TYPE_CHECKING:
    from common.deploy.calibration import Calibration


@dataclass(frozen=True)
class Answer:
    """The classification of one picture.

    picture: its path, or its number.  label, probability: the most probable class.
    level: the level at which the picture exited, for a model with levels; of a cascade 0 for the first model.
    gmacs: the cost in the image tower; None where it cannot be counted.  error: the reason why there is no label.
    top: the most probable classes with their probabilities, as many as were asked for.
    """

    picture: str
    label: str | None = None
    probability: float | None = None
    level: int | None = None
    gmacs: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()


class Classification:
    """Zero-shot classification among fixed labels at a fixed setting; made by ``Deployed.prepare``.

    deployed: the ``Deployed`` that made it, whose module imports this one.
    calibration: the one from which the setting was taken, if any.
    """

    def __init__(
        self,
        deployed: Any,
        labels: Sequence[str],
        templates: Sequence[str],
        setting: float | None,
        topk: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        self.deployed, self.labels, self.templates, self.setting = deployed, labels, templates, setting
        self.topk, self.calibration = topk, calibration
        self._run = deployed.runner(setting, deployed.classes_of_all(labels, templates))

    @property
    def calibrated_on_these(self) -> bool:
        """Whether the model's calibration was made with these labels and templates."""
        calibration = self.deployed.calibration
        return calibration is not None and calibration.prompts == self.deployed.prompts_hash(
            self.labels, self.templates
        )

    def stream(
        self, sources: Iterable[Path | Image.Image], batch_size: int = 64, workers: int | None = None
    ) -> Iterator[Answer]:
        """One answer for each picture, in order. Threads read the pictures, two batches ahead.

        workers: the number of threads; None: one for each core, at most eight.
        The answer for a damaged picture has an error and no label.
        ValueError, at once: batch_size or workers is below 1.
        """
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        decoded = read_ahead(sources, views_transform(self.deployed.preprocesses), workers, 2 * batch_size)
        groups = iter(lambda: list(islice(decoded, batch_size)), [])
        return chain.from_iterable(map(self._answers, groups))

    def _answers(self, pictures: Sequence[Picture]) -> Iterator[Answer]:
        sound = [picture.pixels for picture in pictures if picture.error is None]
        batches = list(map(to_batch, zip(*sound, strict=True), self.deployed.preprocesses))  # none where none is sound
        results = iter(self._results(batches) if sound else ())
        for picture in pictures:
            error = picture.error
            yield Answer(picture.name, error=error) if error is not None else Answer(picture.name, **next(results))

    @torch.no_grad()
    def _results(self, images: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
        """images [B,3,S,S] for each of the members -> what ``Answer`` says of each image."""
        device, dtype = torch.device(self.deployed.device), getattr(torch, self.deployed.dtype)
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            scores, path = self._run(*(x.to(device) for x in images))
        best, costs = scores.float().topk(self.topk, dim=-1), self._costs
        for labels, probabilities, index in zip(
            best.indices.tolist(), best.values.tolist(), path.tolist(), strict=True
        ):
            names = [self.labels[label] for label in labels]
            yield {
                "label": names[0],
                "probability": probabilities[0],
                "level": index if self.deployed.setting_name == "threshold" else None,
                "gmacs": None if costs is None else costs[index],
                "top": tuple(zip(names, probabilities, strict=True)),
            }

    @cached_property
    def _costs(self) -> list[float] | None:
        try:
            return self.deployed.costs
        except ValueError:
            return None  # a foreign architecture may have an operation whose cost is not known

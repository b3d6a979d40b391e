"""Measure a model at one point: accuracy, multiply-adds, images per second beside the whole model, memory.

Shapes: B images of a batch, M images in all, S image size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.lookup import Labelled
from common.evaluate.points import Point, images_at, mean_macs
from common.evaluate.sweep.journal import Record
from common.evaluate.tasks import Run, Settings, observed, pictures_of, runner
from common.memory import working_memory
from common.models import Model
from common.timing import alternate, ratio
from common.zeroshot import Template

HELD = 2**31
"""Pictures of up to so many bytes stay in memory from their first reading on."""
ROUNDS = 3
"""Alternating rounds of a measurement of time, after one that warms up."""
WHOLE = Point()


class Pictures:
    """The batches of a split for one model. Small splits are read once, larger ones at every pass."""

    def __init__(self, model: Model, data: Labelled, settings: Settings, held: int = HELD) -> None:
        self.data = data
        self._read = partial(pictures_of, model, data, settings)
        self._limit, self._held = held, list[Mapping[str, Any]]()
        self._first: Tensor | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._held:
            yield from self._held
            return
        held: list[Mapping[str, Any]] = []
        size = 0
        for batch in self._read():
            size += batch["image"].nbytes
            held.append(batch)
            if size > self._limit:
                held.clear()
            yield batch
        if size <= self._limit:
            self._held = held

    def first(self, count: int) -> Tensor:
        """The first pictures [count,3,S,S]. ValueError: there are fewer."""
        if self._first is None:
            images: list[Tensor] = []
            for batch in self:
                images.append(batch["image"])
                if sum(map(len, images)) >= count:
                    break
            if not images:
                raise ValueError(f"the {self.data.split} split has no picture; check the data")
            self._first = torch.cat(images)
        if len(self._first) < count:
            raise ValueError(
                f"{len(self._first)} pictures of {self.data.split} make no batch of {count}, at which speed is to be "
                f"measured; give --timed {len(self._first)}, or no"
            )
        return self._first[:count]


@dataclass(frozen=True)
class Measure:
    """What is the same for all points: the model, its prompts, and how it runs.

    timed: the batch sizes at which speed is measured; none: it is not.
    """

    model: Model
    templates: Sequence[Template]
    settings: Settings
    timed: tuple[int, ...]

    def __call__(self, point: Point, pictures: Pictures, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> Record:
        """Everything about a point on a split; plain values.

        progress: passes the batches on, and shows where it is.
        "samples", "top1", "top5", "mean_per_class", "interval" (Wilson's, 95 %), "correct": see ``packed``.
        "exits": the share of the images on each path.
        "gmacs", "gmacs_paper": mean of an image; None where an operation's cost is not known, which "uncounted" names.
        "speed": {batch: {"images_per_second", "faster"}}; faster: times the whole model, in the same rounds.
        "memory_mb": the most memory that one pass at the largest of the batches takes, weights and images aside.
        Where the model cannot work at the point, only "reason" is there.
        """
        data = pictures.data
        start = pictures.first(max((*self.timed, 1))).to(self.settings.device)
        try:
            images = images_at(self.model, point)
            run = self._runner(images, point, data)
            run(start[:1])
        except ValueError as error:
            if point == WHOLE:
                raise
            return {"reason": str(error)}
        result, exits = observed(seeded(run), progress(pictures), len(data.class_names), self.settings.device)
        return {
            "samples": len(result.correct),
            "top1": result.top1,
            "top5": result.top5,
            "mean_per_class": result.mean_per_class,
            "interval": list(result.interval),
            "correct": packed(result.correct),
            "exits": exits,
            **self._costs(images, () if point.threshold is None else exits),
            "speed": self._speed(point, run, data, start),
            "memory_mb": working_memory(partial(run, start), self.settings.device) / 2**20 if self.timed else None,
        }

    def _runner(self, images: nn.Module, point: Point, data: Labelled) -> Run:
        settings = replace(self.settings, threshold=point.threshold)
        return runner(replace(self.model, images=images), data.class_names, self.templates, settings)

    def _costs(self, images: nn.Module, exits: Sequence[float]) -> dict[str, Any]:
        try:
            macs = mean_macs(images, self.model.image_size, exits)
        except ValueError as error:
            return {"gmacs": None, "gmacs_paper": None, "uncounted": str(error)}
        return {"gmacs": macs.gmacs, "gmacs_paper": macs.gmacs_paper}

    def _speed(self, point: Point, run: Run, data: Labelled, images: Tensor) -> dict[str, dict[str, float]]:
        """Both pass over the same images, since the cost of early exit depends on them."""
        speeds = {}
        runs = {"point": run}
        if point != WHOLE:
            runs["whole"] = self._runner(images_at(self.model, WHOLE), WHOLE, data)
        for batch in self.timed:
            parts = images.split(batch)
            calls = {name: lambda run=run, parts=parts: [run(part) for part in parts] for name, run in runs.items()}
            times = alternate(calls, ROUNDS)
            faster = ratio(times["whole"], times["point"]) if "whole" in times else 1.0
            speeds[str(batch)] = {"images_per_second": len(images) / times["point"]["seconds"], "faster": faster}
        return speeds


def seeded(run: Run) -> Run:
    """The same run, with a seed for every batch: reducers that draw give the same answers again.

    Loaders draw too, and whether one runs depends on what is in memory.
    """
    seeds = count()

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(next(seeds))
        return run(images)

    return call


def packed(correct: Tensor) -> str:
    """bool [M] as hexadecimal digits, eight images in two of them, the first in the highest bit."""
    return np.packbits(correct.numpy()).tobytes().hex()


def unpacked(digits: str, samples: int) -> Tensor:
    """bool [M] that ``packed`` gave."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=samples)
    return torch.from_numpy(bits.astype(bool))

"""Measure a model at one point: its score, multiply-adds, images per second beside the whole model, memory.

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from common.evaluate.points import Point, images_at, mean_macs
from common.evaluate.sweep.journal import Record
from common.evaluate.sweep.scoring import Progress, Scoring
from common.memory import working_memory
from common.models import Model
from common.timing import alternate, ratio

ROUNDS = 3
"""Alternating rounds of a measurement of time, after one that warms up."""
WHOLE = Point()


@dataclass(frozen=True)
class Measure:
    """What is the same for all points and splits.

    timed: the batch sizes at which speed is measured; none: it is not.
    """

    model: Model
    device: str
    timed: tuple[int, ...]

    def __call__(self, point: Point, scoring: Scoring, progress: Progress) -> Record:
        """Everything about a point on a split; plain values.

        The scores, see ``Scoring``.
        "gmacs", "gmacs_paper": mean of an image; None where an operation's cost is not known, which "uncounted" names.
        "speed": {batch: {"images_per_second", "faster"}}; faster: times the whole model, in the same rounds.
        "memory_mb": the most memory that one pass at the largest of the batches takes, weights and images aside.
        Where the model cannot work at the point, only "reason" is there.
        """
        start = scoring.pictures.first(max((*self.timed, 1))).to(self.device)
        try:
            images = images_at(self.model, point, scoring.classes)
            run = scoring.run(images, point)
            run(start[:1])
        except ValueError as error:
            if point == WHOLE:
                raise
            return {"reason": str(error)}
        scores = scoring(seeded(run), progress)
        return {
            **scores,
            **self._costs(images, () if point.threshold is None else scores["exits"]),
            "speed": self._speed(point, run, scoring, start),
            "memory_mb": working_memory(partial(run, start), self.device) / 2**20 if self.timed else None,
        }

    def _costs(self, images: nn.Module, exits: Sequence[float]) -> dict[str, Any]:
        try:
            macs = mean_macs(images, self.model.image_size, exits)
        except ValueError as error:
            return {"gmacs": None, "gmacs_paper": None, "uncounted": str(error)}
        return {"gmacs": macs.gmacs, "gmacs_paper": macs.gmacs_paper}

    def _speed(
        self, point: Point, run: Callable[[Tensor], Any], scoring: Scoring, images: Tensor
    ) -> dict[str, dict[str, float]]:
        """Both pass over the same images, since the cost of early exit depends on them."""
        speeds = {}
        runs = {"point": run}
        if self.timed and point != WHOLE:
            runs["whole"] = scoring.run(images_at(self.model, WHOLE), WHOLE)
        for batch in self.timed:
            parts = images.split(batch)
            calls = {name: lambda run=run, parts=parts: [run(part) for part in parts] for name, run in runs.items()}
            times = alternate(calls, ROUNDS)
            faster = ratio(times["whole"], times["point"]) if "whole" in times else 1.0
            speeds[str(batch)] = {"images_per_second": len(images) / times["point"]["seconds"], "faster": faster}
        return speeds


def seeded(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same run, with a seed for every batch: reducers that draw give the same answers again.

    Loaders draw too, and whether one runs depends on what is in memory.
    """
    seeds = count()

    def call(images: Tensor) -> Any:
        torch.manual_seed(next(seeds))
        return run(images)

    return call

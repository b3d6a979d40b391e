"""Each image evaluated once by a WaveCLIP at every level and by its teacher; every threshold is computed from that.

Shapes: B images of a batch, M images in all, L levels of the student's answer, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks import read_log
from benchmarks.embedded import LOGGED, MODELS, PART, REVISION, batches, models, prompts
from benchmarks.waveclip.costs import Cost, cost, exit_costs
from common.clip import CLIP
from common.conditions import conditions, digest
from common.early_exit import exit_at
from common.zeroshot import embed_prompts
from waveclip import MarginGate, MaxProbabilityGate, ProgressiveClassifier, WaveTower


@dataclass(frozen=True)
class Observed:
    """What a student's levels and its teacher answered for M images, in one order.

    margin: fp32 [L-1,M], the confidence by the margin at every level but the last, which always answers.
    correct: bool [L,M], whether each level's first guess was right.  teacher: bool [M], whether the teacher's was.
    maximum: fp32 [L-1,M], the confidence by the maximum probability.
    agrees: bool [L-1,M], whether a level guesses what the last one guesses. Both are None where no gates are compared.
    """

    margin: Tensor
    correct: Tensor
    teacher: Tensor
    maximum: Tensor | None = None
    agrees: Tensor | None = None

    @property
    def coarse(self) -> Tensor:
        """Whether the first level's guess was right, bool [M]."""
        return self.correct[0]

    @property
    def fine(self) -> Tensor:
        """Whether the last level's guess was right, bool [M]."""
        return self.correct[-1]

    def at(self, threshold: float) -> tuple[Tensor, list[float]]:
        """Correctness [M] behind a margin gate with this threshold, and the share of images that exit at each level."""
        return exit_at(threshold, self.margin, self.correct)


@torch.no_grad()
def predictions(
    teacher: CLIP, student: WaveTower, loader: Iterable[Mapping[str, Any]], prompts: list[str]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch: the student's class probabilities [L,B,C], the teacher's cosines [B,C], the labels [B].

    loader: batches with "image" [B,3,S,S] and "label".  prompts: one a class, in the order of the labels.
    """
    classes, scale = embed_prompts(teacher, prompts), teacher.logit_scale.exp()
    classifier = ProgressiveClassifier(student, classes, scale, MarginGate(0.0))
    for batch in track(loader, "evaluating"):
        levels = torch.stack([classifier.probabilities(z) for z in student(batch["image"])])
        yield levels, teacher.encode_image(batch["image"]) @ classes.T, batch["label"]


def observe(teacher: CLIP, student: WaveTower, loader: Iterable[Mapping[str, Any]], prompts: list[str]) -> Observed:
    """Both models' answers for all images of ``predictions``, in one pass."""
    margin, maximum = MarginGate(0.0), MaxProbabilityGate(0.0)
    parts = []
    for levels, dense, labels in predictions(teacher, student, loader, prompts):
        guesses, early = levels.argmax(-1), levels[:-1]
        parts.append(
            {
                "margin": margin.confidence(early),
                "correct": guesses == labels,
                "teacher": dense.argmax(-1) == labels,
                "maximum": maximum.confidence(early),
                "agrees": guesses[:-1] == guesses[-1],
            }
        )
    return Observed(**{name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]})


def observed(split: str, smoke: bool = False) -> Observed:
    """The committed models' answers on a split (smoke: its first 500 images), evaluated once in a process.

    Every such evaluation on the whole of test is logged.
    """
    return _observed(split, PART if smoke else None, *map(digest, MODELS[REVISION]))


@cache
def _observed(split: str, pictures: int | None, *weights: str) -> Observed:
    if split == "test" and pictures is None:
        read_log.record("WAVECLIP's table and figures", LOGGED[REVISION], MODELS[REVISION])
    return observe(*models(REVISION), batches(split, pictures, revision=REVISION), prompts(REVISION))


def costs(teacher: CLIP, student: WaveTower) -> tuple[Cost, list[Cost]]:
    """The image tower's cost of one image: in the dense teacher, and in the student at each exit."""
    size = teacher.image_tower.image_size
    return cost(teacher.image_tower, size), exit_costs(student, size)


def sweep_conditions(seeds: int = 1) -> dict[str, Any]:
    """The conditions of a figure that shows models at every threshold. seeds: trainings behind it."""
    weights = {path.name: digest(path) for path in MODELS[REVISION]}
    chosen = "nothing is chosen: a sweep"
    reads = read_log.reads_of_all(LOGGED[REVISION])
    run = {"dtype": "float32", "batch": 1, "weights": weights, "chosen_on": chosen, "reads_of_test": reads}
    return conditions("embedded", seeds=seeds, **run)


def counts(right: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Right answers among each PART consecutive images, by which a later evaluation of a part is checked.

    right: which answers of each model are right, bool [M].
    """
    return {
        name: [int(correct[start : start + PART].sum()) for start in range(0, len(correct), PART)]
        for name, correct in right.items()
    }

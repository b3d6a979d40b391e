"""What a trained model answered for every picture, on disk: tables are made from these files, without the weights.

Shapes: M pictures, L levels (a plain CLIP has one), K levels whose confidence is kept.

A WaveCLIP's confidence is kept for every level but the last, which always answers; a CLIP's for its only level, since
it may be the first step of a cascade.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.waveclip.saving import Exits, Steps
from common.clip import CLIP
from common.zeroshot import embed_prompts, similarity
from waveclip import MarginGate, MaxProbabilityGate, WaveTower
from waveclip.reduced import ReducedWaveTower

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Answers:
    """One model's answers on one split.

    correct: bool [L,M], whether each level's first guess was right.
    margin, maximum: fp32 [K,M], the confidence by the margin of the two highest probabilities, and by the highest. The
        first runs' files have them rounded to fp16.
    """

    correct: np.ndarray
    margin: np.ndarray
    maximum: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """Whether the last level's guess was right, bool [M]."""
        return self.correct[-1]

    def first(self, pictures: int) -> Answers:
        """The answers for the first ``pictures``."""
        return Answers(self.correct[:, :pictures], self.margin[:, :pictures], self.maximum[:, :pictures])

    def exits(self, reference: np.ndarray) -> Exits:
        """Early exit from the first level to the last, compared with the answers [M] of a reference."""
        return Exits(self.margin[0], self.correct[0], self.last, reference)

    def steps(self, reference: np.ndarray) -> Steps:
        """Early exit after any level, by one threshold for all, compared with the answers [M] of a reference."""
        return Steps(np.maximum.accumulate(self.margin, axis=0), self.correct, reference)

    def cascade(self, second: Answers, reference: np.ndarray) -> Exits:
        """This model first and ``second`` where it is not confident; they share nothing."""
        return Exits(self.margin[0], self.last, second.last, reference)


def answers(
    model: CLIP | WaveTower, text_model: CLIP, loader: Iterable[Mapping[str, Any]], prompts: Sequence[str]
) -> Answers:
    """A model's answers for all pictures; see ``answers_of_all``."""
    return answers_of_all({None: (model, text_model)}, loader, prompts)[None]


@torch.no_grad()
def answers_of_all(
    models: Mapping[Key, tuple[nn.Module, CLIP]], loader: Iterable[Mapping[str, Any]], prompts: Sequence[str]
) -> dict[Key, Answers]:
    """Every model's answers for all pictures, which are read once.

    A model that draws, such as one of random places, draws by the number of the batch, so every pass answers alike.

    models: each has ``encode_image``, or levels as a WaveTower; with it the CLIP whose text tower and logit scale it
    takes, a CLIP's own.
    loader: batches with "image" [B,3,S,S] and "label" [B].  prompts: one a class, in the order of the labels.
    """
    clips = {clip for _, clip in models.values()}
    texts = {clip: (embed_prompts(clip, prompts), clip.logit_scale.exp()) for clip in clips}
    gates = (MarginGate(0.0), MaxProbabilityGate(0.0))
    parts: dict[Key, list[list[Tensor]]] = {key: [] for key in models}
    for number, batch in enumerate(track(loader, "evaluating")):
        for key, (model, clip) in models.items():
            classes, scale = texts[clip]
            images = batch["image"].to(next(model.parameters()).device)
            with torch.random.fork_rng():
                torch.manual_seed(number)
                leveled = isinstance(model, WaveTower | ReducedWaveTower)
                levels = model(images) if leveled else [model.encode_image(images)]
            probabilities = torch.stack([(scale * similarity(z, classes)).softmax(-1) for z in levels]).cpu()
            early = probabilities[:-1] if len(levels) > 1 else probabilities
            correct = probabilities.argmax(-1) == batch["label"]
            parts[key].append([correct, *(gate.confidence(early) for gate in gates)])
    joined = {key: [torch.cat(column, dim=-1) for column in zip(*of, strict=True)] for key, of in parts.items()}
    return {key: Answers(*(tensor.numpy() for tensor in columns)) for key, columns in joined.items()}


def write(path: Path, splits: Mapping[str, Answers]) -> None:
    """Write the answers on several splits as one compressed file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for split, part in splits.items():
        arrays[f"{split}.correct"] = np.packbits(part.correct, axis=1)
        arrays[f"{split}.pictures"] = np.array(part.correct.shape[1])
        arrays |= {f"{split}.margin": part.margin, f"{split}.maximum": part.maximum}
    np.savez_compressed(path, **arrays)


def read(path: Path) -> dict[str, Answers]:
    """The answers of a file that ``write`` wrote, by split."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    splits = sorted({name.split(".")[0] for name in arrays})
    return {
        split: Answers(
            np.unpackbits(arrays[f"{split}.correct"], axis=1, count=int(arrays[f"{split}.pictures"])).astype(bool),
            *(arrays[f"{split}.{gate}"].astype(np.float32) for gate in ("margin", "maximum")),
        )
        for split in splits
    }

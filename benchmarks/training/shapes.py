"""The trainings on the scenes of shape (revision 2), three seeds each; every run leaves its answers for the tables.

The runs stand in `make retrain`, which trains what is not finished: ``ONLY='shapes-*'`` these alone. Students and
teachers that are trained on start from the teacher of seed 0, the students of "waveclip-longer" from that teacher
trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks import ROOT, WEIGHTS, read_log, read_recipe
from benchmarks.cells import accuracy_of
from benchmarks.embedded import MODELS, PART, STUDENT_96, TEACHER_96
from benchmarks.training.run import STORED, Run, Settings
from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from common.clip import CLIP
from common.data.embedded.module import EmbeddedDataModule, indices, prompt, scene, scenes_of
from common.weights import read_record
from waveclip import WaveTower

SEEDS = range(3)
TEACHER, STUDENT = MODELS[2]
HALF, LONGER = WEIGHTS / "shapes_clip_half.safetensors", WEIGHTS / "shapes_clip_longer.safetensors"
STUDENT_OF_LONGER = WEIGHTS / "shapes_waveclip_longer.safetensors"
"""The committed weights: those of seed 0."""
SPLITS = ("val", "test", "unseen", "retrieval")
"""Thresholds are chosen on val. On "unseen" a model tells the held-out names apart, on "retrieval" the captions."""
COSINE_SHARES = (10, 25, 100)
"""Lengths of the paper's recipe, in % of the teacher's steps."""
_CLIP, _HALF, _WAVE = "common/shapes_clip.yaml", "common/shapes_clip_half.yaml", "waveclip/shapes.yaml"
_CLIP_96, _WAVE_96 = "common/shapes_clip_96.yaml", "waveclip/shapes_96.yaml"
STEPS = read_recipe(_CLIP)["trainer"]["max_steps"]
"""Training steps of the teacher."""
_ON_FRONTIER = ("teacher", "half", "waveclip", "longer", "waveclip-longer")
"""The families of which the frontier needs every seed's weights."""
_COSINE = {"model": {"distribution_weight": 0, "contrastive_weight": 0}}
_LONGER, _FROM_LONGER = ({"model": {"weights": str(file.relative_to(ROOT))}} for file in (TEACHER, LONGER))


def _family(name: str, recipe: str, minutes: int, output: Path | None = None, **settings: Any) -> tuple[str, list[Run]]:
    """A run of each seed; ``output`` is where the weights of seed 0 go, those of the frontier's others beside it."""
    runs = []
    for seed in SEEDS:
        apart = output.with_stem(f"{output.stem}-seed{seed}") if output and name in _ON_FRONTIER else None
        runs.append(Run(f"shapes-{name}-{seed}", recipe, minutes, seed, output=apart if seed else output, **settings))
    return f"shapes-{name}", runs


FAMILIES = (
    _family("teacher", _CLIP, 45, TEACHER),
    _family("half", _HALF, 50, HALF),
    _family("waveclip", _WAVE, 45, STUDENT),
    _family("longer", _CLIP, 45, LONGER, settings=_LONGER),
    _family("waveclip-longer", _WAVE, 45, STUDENT_OF_LONGER, settings=_FROM_LONGER),
    *(
        _family(f"cosine{share}", _WAVE, 45 * share // 100, settings=_COSINE, length=STEPS * share // 100)
        for share in COSINE_SHARES
    ),
    _family("teacher96", _CLIP_96, 35, TEACHER_96),
    _family("waveclip96", _WAVE_96, 35, STUDENT_96),
)
"""The runs of one training with other seeds, in the order in which they stand on each other."""
FEWER_PATCHES = (
    _family("flip", "patchrank/embedded_flip.yaml", 30),
    _family("captions", _CLIP, 45, settings={"model": {"class_weight": 0}}),
    _family("aclip", "patchrank/embedded_aclip.yaml", 60),
)
"""Pretrainings that see a part of each picture, and a CLIP that learns from captions alone, as A-CLIP does."""
RUNS = tuple(run for _, runs in (*FAMILIES, *FEWER_PATCHES) for run in runs)
Known = dict[str, dict[str, dict[int, Answers]]]
"""Answers by family ("shapes-teacher"), split, and training seed, ascending."""


def file(name: str) -> Path:
    """Where a run's answers lie."""
    return STORED / f"{name}.npz"


def finished(families: Sequence[tuple[str, Sequence[Run]]] = FAMILIES) -> Known:
    """The answers of every finished run of these families."""
    known: Known = {}
    for name, runs in families:
        parts = {run.seed: answers.read(file(run.name)) for run in runs if file(run.name).is_file()}
        if parts:
            known[name] = {split: {seed: part[split] for seed, part in parts.items()} for split in SPLITS}
    return known


def evaluate(
    weights: Path,
    recipe: str,
    output: Path | None,
    splits: Sequence[str] = SPLITS,
    batches: int | None = None,
    changes: Settings = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a model's answers to ``output``, log a look at test, and return each split's and level's accuracy.

    recipe, changes: hold picture size and, for a WaveCLIP, the teacher.  output: None: the answers are not kept, as
    those of a training with other settings.  batches: how many of a split; None: all.
    """
    settings = read_recipe(recipe)
    data = EmbeddedDataModule(**settings["data"]["init_args"] | {"batch_size": 250, "captions": False})
    if "wave" in read_record(weights):
        model: CLIP | WaveTower = WaveTower.load(weights).eval()
        arguments = settings["model"]["init_args"] | changes.get("model", {})
        text_model = CLIP.load(ROOT / arguments["weights"]).eval()
    else:
        model = text_model = CLIP.load(weights).eval()
    read: dict[str, Answers] = {}
    for split in splits:
        if split == "test":
            read_log.record("retrain", "shapes", [weights])
        prompts, first = candidates(split, data)
        loader = islice(data.dataloader(split, train=False), batches)
        read[split] = answers.answers(model, text_model, labelled(loader, first), prompts)
    if output:
        answers.write(output, read)
    return {"names": len(data.class_names)} | {split: _accuracies(part) for split, part in read.items()}


def candidates(split: str, data: EmbeddedDataModule) -> tuple[list[str], int | None]:
    """The texts that a split's pictures are told apart by, and the label of the first; None: a picture's number."""
    if split == "retrieval":
        return [scene(split, index, data.revision)[1] for index in indices(split, data.revision)], None
    if split == "unseen":
        return [prompt(name) for name in scenes_of(data.revision).class_names(split)], len(data.class_names)
    return data.class_prompts, 0


def labelled(loader: Iterable[Mapping[str, Any]], first: int | None) -> Iterator[dict[str, Any]]:
    """The batches with labels that number the texts from 0; first: as in ``candidates``."""
    seen = 0
    for batch in loader:
        labels = torch.arange(seen, seen + len(batch["label"])) if first is None else batch["label"] - first
        seen += len(labels)
        yield {**batch, "label": labels}


def _accuracies(part: Answers) -> dict[str, dict[str, Any]]:
    """Accuracy, interval and number of pictures of each level, and the right answers on the first PART, for checks."""
    last = len(part.correct) - 1
    levels = ["coarse", *(f"level {step}" for step in range(1, last)), "fine"] if last else ["top1"]
    return {
        level: {**accuracy_of(correct), "pictures": len(correct), "first": int(correct[:PART].sum())}
        for level, correct in zip(levels, part.correct, strict=True)
    }

"""What ``deploy_costs`` measures: which models, exported for every engine, on which pictures.

Shapes: B images, S pixels, M images in all, C classes, E joint dim.

A cascade of two CLIPs is the control of a WaveCLIP: early exit whose levels share nothing. Its first model sees the
same pictures at half the size, and its second is the dense model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import WEIGHTS
from benchmarks.embedded import first_pictures
from benchmarks.together.deploy_engines import PROMPT, Prepared, prepare
from benchmarks.together.deploy_workers import Part, Work
from benchmarks.together.photos import name_of
from benchmarks.training.run import STORED
from benchmarks.training.shapes import HALF, RUNS, STUDENT, TEACHER
from common import directory
from common.clip import CLIP, load_architecture
from common.data.classification import ClassificationSet, own_split
from common.data.embedded.module import SPLITS, TEMPLATES, pack, recipe_hash, scenes_of
from common.data.lookup import Labelled, Place, source, splits_of
from common.data.pictures import loader
from common.data.sources import Samples
from common.deploy.model import Deployed, load
from common.deploy.reduced import STATIC, Reduction, draw
from common.evaluate.tasks import Settings
from common.preprocess import Preprocess
from waveclip import WaveTower

DENSE, WAVE, CASCADE = "dense", "WaveCLIP", "cascade"
FIRST = "first"
"""The first model of CASCADE."""
BATCHES = (1, 8, 32)
"""How many pictures engines answer at once."""
SHAPES, RANDOM = "scenes of shape", "random"
_REVISION = 2
_TIMED, _CLASSES = 128, 1000
_AT_ONCE = 6
"""Eleven processes with the three models of ViT-B/16's size needed more than 29 GB; six should leave room in 24 GB."""
WORKERS = 0  # the engines take every core while they answer
_TWO = ("red cat", "blue bird")
Options = dict[str, str]
"""Arguments of ``load``."""


@dataclass(frozen=True)
class Case:
    """Models by their names DENSE, WAVE and perhaps CASCADE, and what they are measured on.

    models: as they are deployed.  work: as engines run them; CASCADE's second model is DENSE's.
    val, test: labelled pictures; None: random weights, whose accuracy means nothing.
    limit: the first so many of each; None: all.  every: one of so many is answered.
    logged: the data's name in the log of reads of test; None: the models are not committed ones.
    steps: the training steps of DENSE, of WAVE after them, and of FIRST, where they are known.
    at_once: how many engines' processes the memory holds; None: all.
    """

    models: Mapping[str, Prepared]
    work: Work
    val: Labelled | None = None
    test: Labelled | None = None
    limit: int | None = None
    every: int = 1
    logged: str | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    at_once: int | None = None

    @property
    def views(self) -> list[Preprocess]:
        """How a picture is prepared for a cascade's first model, if there is one, and for all others."""
        return max((prepared.deployed.preprocesses for prepared in self.models.values()), key=len)

    def seen(self, images: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        """Which of the images, one for each of ``views``, every side sees."""
        return {side: images[-len(parts) :] for side, parts in self.work.items()}


MODELS = ("DENSE", "WAVECLIP", "FIRST")
"""The variables that name models; FIRST is the first one of a cascade, whose second is DENSE."""


def named() -> dict[str, str] | None:
    """DENSE, WAVECLIP, perhaps FIRST, and DATA of the environment; None: it names no pair.

    DATA alone, where it is a folder, stands for the models that reproduce-photos left in benchmarks/weights for a
    folder of that name, such as cifar10. Without DENSE and WAVECLIP among them, DATA is meant for other tables.
    ValueError: a model is set, and not DENSE, WAVECLIP and DATA.
    """
    given = {name: os.path.expanduser(os.environ[name]) for name in MODELS if os.environ.get(name)}
    data = os.environ.get("DATA")
    if given:
        if not data or not given.keys() >= {"DENSE", "WAVECLIP"}:
            raise ValueError(
                f"{given}, DATA={data}: set DENSE and WAVECLIP to models and DATA to their pictures, or none; FIRST, "
                "the first model of a cascade, goes with them"
            )
        return given | {"DATA": data}
    files = committed(data) if data and Path(data).expanduser().is_dir() else {}
    return {**files, "DATA": data} if files.keys() >= {"DENSE", "WAVECLIP"} else None


def committed(data: str) -> dict[str, str]:
    """The committed weights for a folder of photographs, those of MODELS that are there."""
    name = name_of(Path(data)).replace("-", "_")
    files = (WEIGHTS / f"photos_{name}_{model}.safetensors" for model in ("clip", "waveclip", "clip_half"))
    return {variable: str(file) for variable, file in zip(MODELS, files, strict=True) if file.is_file()}


def title(data: str) -> str:
    """What the table calls the data: a folder by its own name alone."""
    return Path(data).expanduser().resolve().name if Path(data).expanduser().exists() else data


def of_shapes(folder: Path, smoke: bool) -> Case:
    """The committed models on the scenes of shape. A smoke run draws the few that it needs, and packs nothing."""
    dense, wave, half = map(str, (TEACHER, STUDENT, HALF))
    models = {
        DENSE: {"model": dense},
        WAVE: {"model": wave, "text_model": dense},
        CASCADE: {"model": dense, "first": half},
    }
    limit = _limit(smoke)
    val, test = (_scenes(split, limit) for split in ("val", "test"))
    case = _of_data(models, val, test, folder, limit)
    return replace(case, logged="shapes", steps=_steps({DENSE: dense, WAVE: wave, FIRST: half}))


def _scenes(split: str, count: int | None) -> Labelled:
    """The first pictures of a split of the scenes of shape; None: all."""
    if count is None:
        pack(split, revision=_REVISION)
    names = scenes_of(_REVISION).class_names("seen")
    shown, labels = first_pictures(split, count or SPLITS[_REVISION][split][0], _REVISION)
    data = ClassificationSet(Samples(shown, labels.tolist(), names), SHAPES, names, TEMPLATES)
    version = recipe_hash(revision=_REVISION)
    return Labelled(split, names, TEMPLATES, "accuracy", partial(loader, data), version)


def of_user(given: Mapping[str, str], folder: Path, smoke: bool) -> Case:
    """The user's models on a set of the catalogue, or on own pictures; train chooses where there is no val.

    Undivided pictures of the user's own are parted as ``benchmarks.together.photos`` parts them.
    A WaveCLIP's weights file has no text tower, so that of DENSE serves it.
    ValueError: EVERY is no number, or the data has no such splits.
    """
    texts = {"text_model": given["DENSE"]} if Path(given["WAVECLIP"]).is_file() else {}
    models = {DENSE: {"model": given["DENSE"]}, WAVE: {"model": given["WAVECLIP"], **texts}}
    if "FIRST" in given:
        models[CASCADE] = {"model": given["DENSE"], "first": given["FIRST"]}
    every = os.environ.get("EVERY", "1")
    if not every.isdecimal() or int(every) < 1:
        raise ValueError(f"EVERY={every}: one of so many pictures is answered; give a whole number from 1")
    name, place = given["DATA"], Place(os.environ.get("EFFCLIP_DATA"))
    splits = splits_of(name, "zeroshot")
    if splits == ("all",):
        val, test = (_part(name, split) for split in ("val", "test"))
    else:
        chosen = "val" if "val" in splits else "train"
        val, test = (source(name, "zeroshot", split, place) for split in (chosen, "test"))
    case = _of_data(models, val, test, folder, _limit(smoke))
    ours = given["DENSE"] == committed(name).get("DENSE")
    logged = f"photos-{name_of(Path(name))}" if ours else None
    files = {
        side: given[variable] for side, variable in zip((DENSE, WAVE, FIRST), MODELS, strict=True) if variable in given
    }
    return replace(case, every=int(every), logged=logged, steps=_steps(files))


def _steps(files: Mapping[str, str]) -> dict[str, int]:
    """The training steps of those weights that are committed, as the records of their runs say."""
    names = {str(run.output): run.name for run in RUNS}
    records = {
        side: STORED / f"{names.get(file, Path(file).stem.replace('_', '-'))}.json"
        for side, file in files.items()
        if Path(file).parent == WEIGHTS
    }
    return {side: json.loads(record.read_text())["steps"] for side, record in records.items() if record.is_file()}


def _part(pictures: str, split: str) -> Labelled:
    """A split of the user's undivided pictures: the one that no training saw."""
    data = own_split(pictures, split)
    return Labelled(split, data.class_names, (), data.metric, partial(loader, data), version=data.version)


def _limit(smoke: bool) -> int | None:
    return 2 * BATCHES[-1] if smoke else None


def _of_data(options: Mapping[str, Options], val: Labelled, test: Labelled, folder: Path, limit: int | None) -> Case:
    """Models on labelled pictures.

    ValueError: DENSE and WAVE prepare pictures differently, or the first model of CASCADE has levels of its own.
    """
    loaded = {side: load(**some, device="cpu") for side, some in options.items()}
    hows = {side: deployed.model.preprocess for side, deployed in loaded.items()}
    if hows[DENSE] != hows[WAVE]:
        raise ValueError(f"the models prepare pictures differently, so one reading cannot serve both: {hows}")
    early = loaded[CASCADE].first if CASCADE in loaded else None
    if early is not None and early.setting_name == "threshold":
        raise ValueError(f"FIRST: {early.name} has a threshold of its own; name a model without one")
    # Drawn at random, because the pictures of a class may follow one another, and some classes leave early.
    whole, settings = loaded.get(CASCADE, loaded[DENSE]), Settings(workers=WORKERS, limit=limit)
    ranges, timed = (
        list(zip(*draw(whole, Reduction(STATIC, data, 0.0, settings)).values(), strict=True)) for data in (val, test)
    )
    labels = list(val.class_names)[:2]
    models = {
        side: prepare(deployed, options[side], labels, folder / side, ranges[-len(deployed.members) :])
        for side, deployed in loaded.items()
    }

    def classes(deployed: Deployed) -> Tensor:
        return deployed.classes(val.class_names, val.templates or deployed.templates)

    return Case(models, _work(models, classes, [torch.stack(some[:_TIMED]) for some in timed]), val, test, limit)


def _work(models: Mapping[str, Prepared], classes: Callable[[Deployed], Tensor], images: Sequence[Tensor]) -> Work:
    """What engines run.

    classes: the class embeddings of one model.
    images: those to be timed, [M,3,S,S] for CASCADE's first model, if it is there, and for all others.
    """
    work = {side: [Part(models[side], classes(models[side].deployed), images[-1])] for side in (DENSE, WAVE)}
    if CASCADE in models:
        first = models[CASCADE].first
        work[CASCADE] = [Part(first, classes(first.deployed), images[0]), *work[DENSE]]
    return work


def of_random_weights(folder: Path, smoke: bool) -> Case:
    """Random weights of ViT-B/16's size among 1000 classes, for the costs alone."""
    torch.manual_seed(0)
    architecture = CLIP.tiny().architecture if smoke else load_architecture("ViT-B-16")
    size = architecture["vision_cfg"]["image_size"]
    clip, half = (
        CLIP({**architecture, "vision_cfg": {**architecture["vision_cfg"], "image_size": some}}).eval()
        for some in (size, size // 2)
    )
    towers = {
        DENSE: (clip, None),
        WAVE: (WaveTower.from_image_tower(clip.image_tower).eval(), clip),
        FIRST: (half, None),
    }
    folders = {name: str(folder / f"{name}-model") for name in towers}
    for name, (tower, texts) in towers.items():
        directory.write(Path(folders[name]), tower, texts, _TWO, PROMPT)
    options: dict[str, Options] = {side: {"model": folders[side]} for side in (DENSE, WAVE)}
    options[CASCADE] = {"model": folders[DENSE], "first": folders[FIRST]}
    images = [torch.randn(BATCHES[-1], 3, some, some) for some in (size // 2, size)]
    models = {}
    for side, some in options.items():
        deployed = load(**some, device="cpu")
        models[side] = prepare(deployed, some, _TWO, folder / side, images[-len(deployed.members) :])
    classes = F.normalize(torch.randn(_CLASSES, architecture["embed_dim"]), dim=-1)
    return Case(models, _work(models, lambda _: classes, images), at_once=_AT_ONCE)

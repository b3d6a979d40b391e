"""What a dense CLIP and a WaveCLIP cost on every engine: images/s, accuracy, size, start-up and memory.

Shapes: B images, S pixels, M images in all, L levels of a model, C classes, E joint dim.

Every engine runs the same early exit, in a process of its own (``deploy_workers``). Thresholds are chosen on ``val``
with the engine's own answers, so that all engines refine the same share; ``test`` gives the numbers and nothing else.
``deploy_tables`` writes the tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks import WEIGHTS, read_log
from benchmarks.cells import accuracy_of
from benchmarks.embedded import first_pictures
from benchmarks.together.deploy_engines import (
    PROMPT,
    REFERENCE,
    REFERENCE_INT8,
    Engine,
    Prepared,
    engines,
    first_answers,
    prepare,
)
from benchmarks.together.deploy_workers import Work, Workers, workers
from benchmarks.together.photos import name_of
from benchmarks.training.shapes import STUDENT, TEACHER
from common import directory
from common.clip import CLIP, load_architecture
from common.conditions import conditions, digest
from common.data.classification import ClassificationSet, own_split
from common.data.embedded.module import SPLITS, TEMPLATES, pack, recipe_hash, scenes_of
from common.data.lookup import Labelled, Place, source, splits_of
from common.data.pictures import loader
from common.data.sources import Samples
from common.deploy.model import load
from common.deploy.reduced import STATIC, Reduction, draw
from common.early_exit import exit_at, threshold_for
from common.evaluate.accuracy import paired_difference
from common.evaluate.tasks import Settings, first
from common.paths import runs_directory
from common.progress import bar
from common.timing import Timed, rounds_ratio, take_turns
from waveclip import WaveTower

DENSE, WAVE = "dense", "WaveCLIP"
POINTS = {"low": 0.15, "mid": 0.27, "high": 0.56}
"""Operating points of the WaveCLIP: the share of images that its first level does not answer."""
BATCHES = (1, 8, 32)
SHAPES, RANDOM = "scenes of shape", "random"
_REVISION = 2
_TIMED, _CLASSES = 128, 1000
_WORKERS = 0  # the engines take every core while they answer
_TWO = ("red cat", "blue bird")
Key = tuple[str, str]
"""An engine's name, and DENSE or WAVE."""


@dataclass(frozen=True)
class Case:
    """Two models that prepare pictures alike, and what they are measured on.

    models: DENSE and WAVE.  classes: unit embeddings [C,E] of each.  images: normalised [M,3,S,S], to be timed.
    val, test: labelled pictures; None: random weights, whose accuracy means nothing.
    limit: the first so many of each; None: all.  every: one of so many is answered.
    logged: the data's name in the log of reads of test; None: the models are not committed ones.
    """

    models: Mapping[str, Prepared]
    classes: Mapping[str, Tensor]
    images: Tensor
    val: Labelled | None = None
    test: Labelled | None = None
    limit: int | None = None
    every: int = 1
    logged: str | None = None


def measure(smoke: bool = False) -> dict[str, Any]:
    """All tables: the models of the scenes of shape, those of ``named``, random ViT-B/16.

    Finished tables are stored as they come, so that a run which was interrupted goes on behind them.
    smoke: few pictures, one round, and the smallest towers in place of ViT-B/16; nothing is stored.
    ValueError: as ``named``.
    """
    given = named()
    found, missing = engines()
    if given is None and all(file.is_file() for file in _pair("cifar10")):
        missing["CIFAR-10"] = "DATA=DIR, its folder as docs/photos.md says"
    stored = None if smoke else _Stored(given, list(found))
    result: dict[str, Any] = {"missing": missing, "tables": stored.tables() if stored else {}}
    with TemporaryDirectory() as place:
        makers: dict[str, Callable[[Path], Case]] = {SHAPES: partial(_shapes, smoke=smoke)}
        if given:
            makers[_title(given["DATA"])] = partial(_own, given, smoke=smoke)
        makers[RANDOM] = partial(_random, smoke=smoke)
        folders = {name: Path(place) / str(number) for number, name in enumerate(makers)}  # a name may hold a slash
        # All exports come first, so that models which cannot be exported are known before anything is measured.
        cases = {name: make(folders[name]) for name, make in makers.items() if name not in result["tables"]}
        for name, case in cases.items():
            rounds = 1 if smoke else 3 if name == RANDOM else 11
            result["tables"][name] = _table(case, found, folders[name], rounds, smoke)
            if stored:
                stored.write(result["tables"])
    if stored:
        stored.forget()
    return result


class _Stored:
    """Tables of a run that was interrupted, which count for the same clean revision, machine, weights and engines.

    given: as of ``named``.
    """

    def __init__(self, given: Mapping[str, str] | None, engines: Sequence[str]) -> None:
        models = (TEACHER, STUDENT, *(Path(given[name]) for name in ("DENSE", "WAVECLIP") if given))
        files = [file for model in models for file in (model, *sorted(model.rglob("*"))) if file.is_file()]
        weights = {str(file): digest(file) for file in files}
        self._made_by = conditions("embedded", given=given, weights=weights, engines=engines)
        del self._made_by["date"]
        self._file = runs_directory() / "deploy-tables.json"

    def tables(self) -> dict[str, Any]:
        """The finished tables by name; none where anything else has changed."""
        found = json.loads(self._file.read_text()) if self._file.is_file() else {}
        return found["tables"] if self._made_by["clean"] and found.get("made_by") == self._made_by else {}

    def write(self, tables: Mapping[str, Any]) -> None:
        """Store the tables that are finished."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"made_by": self._made_by, "tables": tables}))

    def forget(self) -> None:
        """The run is complete, so the next one measures anew."""
        self._file.unlink(missing_ok=True)


def named() -> dict[str, str] | None:
    """DENSE, WAVECLIP and DATA of the environment; None: it names no pair.

    DATA alone, where it is a folder, stands for the pair that reproduce-photos left in benchmarks/weights for a folder
    of that name, such as cifar10. Without such a pair, DATA is meant for other tables.
    ValueError: DENSE or WAVECLIP is set, and not all three.
    """
    given = {name: os.environ.get(name) for name in ("DENSE", "WAVECLIP", "DATA")}
    if given["DENSE"] or given["WAVECLIP"]:
        if not all(given.values()):
            raise ValueError(f"{given}: set DENSE and WAVECLIP to models and DATA to their pictures, or none")
        return given | {name: os.path.expanduser(given[name]) for name in ("DENSE", "WAVECLIP")}
    data = given["DATA"]
    pair = _pair(data) if data and Path(data).expanduser().is_dir() else ()
    if not pair or not all(file.is_file() for file in pair):
        return None
    return dict(zip(("DENSE", "WAVECLIP"), map(str, pair), strict=True)) | {"DATA": data}


def _pair(data: str) -> tuple[Path, Path]:
    """The committed weights of CLIP and WaveCLIP for a folder of photographs."""
    name = name_of(Path(data)).replace("-", "_")
    clip, wave = (WEIGHTS / f"photos_{name}_{model}.safetensors" for model in ("clip", "waveclip"))
    return clip, wave


def _title(data: str) -> str:
    """What the table calls the data: a folder by its own name alone."""
    return Path(data).expanduser().resolve().name if Path(data).expanduser().exists() else data


def _table(case: Case, found: Mapping[str, Engine], folder: Path, rounds: int, smoke: bool) -> dict[str, Any]:
    """Rows for each engine and operating point, and what each engine needs for either model."""
    files = {side: prepared.deployed.model.files for side, prepared in case.models.items()}
    if case.logged and not smoke:
        read_log.record("deploy", case.logged, [Path(made.options["model"]) for made in case.models.values()])
    keys = [(name, side) for name in found for side in case.models]
    with workers(found, Work(case.models, case.classes, case.images)) as team:
        if case.test is None:  # the shares are met on the images that are timed
            answers = {"val": {(name, side): team.ask(name, "answer", side) for name, side in keys}}
        else:
            splits = (("val", case.val), ("test", case.test))
            answers = {split: _answers(case, keys, team, data) for split, data in splits}
        rows = [row for key in keys if key[0] not in team.lost for row in _points(key, answers)]
        _time(rows, len(case.images), team, rounds)
    lost = dict(team.lost)
    rows = [row for row in rows if row["engine"] not in lost]
    needs = _needs(case, {name: engine for name, engine in found.items() if name not in lost}, folder, lost, smoke)
    pictures = (
        {} if case.test is None else {split: some[REFERENCE, DENSE][1].shape[1] for split, some in answers.items()}
    )
    return {
        "weights": files,
        "rows": rows,
        "needs": needs,
        "missing": lost,
        "pictures": pictures,
        "rounds": rounds,
        "timed": len(case.images),
    }


def _needs(
    case: Case, found: Mapping[str, Engine], folder: Path, lost: dict[str, str], smoke: bool
) -> list[dict[str, Any]]:
    """Size, start-up and memory of each engine for either model; a start that fails is added to ``lost``."""
    size, picture = case.images.shape[-1], folder / "picture.png"
    Image.effect_noise((size, size), 64).convert("RGB").save(picture)
    needs = []
    for name, engine in found.items():
        for side, prepared in case.models.items():
            small = smoke and (side != DENSE or name not in (REFERENCE, REFERENCE_INT8))
            try:
                measured = None if small else first_answers(engine, prepared, picture)
            except ValueError as error:
                measured, lost[f"the start of {name}, {side}"] = None, str(error)
            needs.append({"engine": name, "model": side, "bytes": engine.size(prepared), "first": measured})
    return needs


def _points(key: Key, answers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one engine and model: one of a dense one, and one of a WaveCLIP at each of POINTS."""
    engine, side = key
    margin, _ = answers["val"][key]
    for point, share in ({"": 0.0} if side == DENSE else POINTS).items():
        threshold = threshold_for(margin[0], share) if len(margin) else 0.0
        row: dict[str, Any] = {"engine": engine, "side": side, "point": point, "threshold": threshold}
        if "test" in answers:
            margin_of_test, correct = answers["test"][key]
            right, shares = exit_at(threshold, margin_of_test, correct)
            dense, dense_int8 = (answers["test"][name, DENSE][1][-1] for name in (REFERENCE, REFERENCE_INT8))
            row |= accuracy_of(right) | {"refined": 1 - shares[0]}
            row |= {"against": paired_difference(right, dense), "against_int8": paired_difference(right, dense_int8)}
        yield row


def _answers(case: Case, keys: Sequence[Key], team: Workers, data: Labelled) -> dict[Key, tuple[Tensor, Tensor]]:
    """What ``Runner.answer`` of every engine that is not lost gives for all pictures, from one reading of the data."""
    parts: dict[Key, list[tuple[Tensor, Tensor]]] = {key: [] for key in keys}
    how, start = case.models[DENSE].deployed.model.preprocess, 0
    for batch in bar(first(data.loader(how, 64, _WORKERS), case.limit), f"answering {data.split}"):
        rows = torch.arange(-start % case.every, len(batch["label"]), case.every)
        start += len(batch["label"])
        for (name, side), some in parts.items() if len(rows) else ():
            some.append(team.ask(name, "answer", side, batch["image"][rows], batch["label"][rows]))
    return {
        key: tuple(torch.cat(tensors, -1) for tensors in zip(*some, strict=True))
        for key, some in parts.items()
        if key[0] not in team.lost
    }


def _time(rows: Sequence[dict[str, Any]], count: int, team: Workers, rounds: int) -> None:
    """Add "speed" to each row: images/s by batch size, and its ratio to both dense references in each round.

    count: images in a pass. An engine that is lost takes NaN seconds.
    """
    keys = [(row["engine"], row["side"]) for row in rows]
    for row in rows:
        row["speed"] = {}
    for batch in BATCHES:
        turns = {str(place): partial(_turn, team, row, batch) for place, row in enumerate(rows)}
        measured = list(take_turns(turns, rounds).values())
        dense, dense_int8 = (measured[keys.index((name, DENSE))] for name in (REFERENCE, REFERENCE_INT8))
        for row, spent in zip(rows, measured, strict=True):
            row["speed"][str(batch)] = {
                "images_per_second": count / spent["seconds"],
                "ratios": rounds_ratio(dense, spent),
                "ratios_int8": rounds_ratio(dense_int8, spent),
            }


def _turn(team: Workers, row: Mapping[str, Any], batch: int) -> Timed:
    found = team.ask(row["engine"], "time", row["side"], row["threshold"], batch)
    return Timed(nan, None) if found is None else found


def _shapes(folder: Path, smoke: bool) -> Case:
    """The committed models on the scenes of shape. A smoke run draws the few that it needs, and packs nothing."""
    models = {DENSE: {"model": str(TEACHER)}, WAVE: {"model": str(STUDENT), "text_model": str(TEACHER)}}
    limit = _limit(smoke)
    val, test = (_scenes(split, limit) for split in ("val", "test"))
    return replace(_of_data(models, val, test, folder, limit), logged="shapes")


def _scenes(split: str, count: int | None) -> Labelled:
    """The first pictures of a split of the scenes of shape; None: all."""
    if count is None:
        pack(split, revision=_REVISION)
    names = scenes_of(_REVISION).class_names("seen")
    shown, labels = first_pictures(split, count or SPLITS[_REVISION][split][0], _REVISION)
    data = ClassificationSet(Samples(shown, labels.tolist(), names), SHAPES, names, TEMPLATES)
    version = recipe_hash(revision=_REVISION)
    return Labelled(split, names, TEMPLATES, "accuracy", partial(loader, data), "embedded", version)


def _own(given: Mapping[str, str], folder: Path, smoke: bool) -> Case:
    """The user's models on a set of the catalogue, or on own pictures; train chooses where there is no val.

    Undivided pictures of the user's own are parted as ``benchmarks.together.photos`` parts them.
    A WaveCLIP's weights file has no text tower, so that of DENSE serves it.
    ValueError: EVERY is no number, or the data has no such splits.
    """
    texts = {"text_model": given["DENSE"]} if Path(given["WAVECLIP"]).is_file() else {}
    models = {DENSE: {"model": given["DENSE"]}, WAVE: {"model": given["WAVECLIP"], **texts}}
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
    committed = given["DENSE"] == str(_pair(name)[0])
    return replace(case, every=int(every), logged=f"photos-{name_of(Path(name))}" if committed else None)


def _part(pictures: str, split: str) -> Labelled:
    """A split of the user's undivided pictures: the one that no training saw."""
    data = own_split(pictures, split)
    return Labelled(split, data.class_names, (), data.metric, partial(loader, data), version=data.version)


def _limit(smoke: bool) -> int | None:
    return 2 * BATCHES[-1] if smoke else None


def _of_data(
    options: Mapping[str, dict[str, str]], val: Labelled, test: Labelled, folder: Path, limit: int | None
) -> Case:
    """Both models on labelled pictures. ValueError: the models prepare pictures differently."""
    loaded = {side: load(**some, device="cpu") for side, some in options.items()}
    hows = {side: model.model.preprocess for side, model in loaded.items()}
    if hows[DENSE] != hows[WAVE]:
        raise ValueError(f"the models prepare pictures differently, so one reading cannot serve both: {hows}")
    models, classes = {}, {}
    for side, deployed in loaded.items():
        drawn = draw(deployed, Reduction(STATIC, val, 0.0, Settings(workers=_WORKERS, limit=limit)))
        labels = list(val.class_names)[:2]
        models[side] = prepare(deployed, options[side], labels, folder / side, list(drawn.values()))
        classes[side] = deployed.classes(val.class_names, val.templates or deployed.templates)
    # Drawn at random, because the pictures of a class may follow one another, and some classes leave early.
    timed = draw(loaded[DENSE], Reduction(STATIC, test, 0.0, Settings(workers=_WORKERS, limit=limit)))
    return Case(models, classes, torch.stack(list(timed.values())[:_TIMED]), val, test, limit)


def _random(folder: Path, smoke: bool) -> Case:
    """Random weights of ViT-B/16's size among 1000 classes, for the costs alone."""
    torch.manual_seed(0)
    clip = (CLIP.tiny() if smoke else CLIP(load_architecture("ViT-B-16"))).eval()
    towers = {DENSE: (clip, None), WAVE: (WaveTower.from_image_tower(clip.image_tower).eval(), clip)}
    size, models = clip.image_tower.image_size, {}
    images = torch.randn(BATCHES[-1], 3, size, size)
    for side, (tower, texts) in towers.items():
        directory.write(folder / f"{side}-model", tower, texts, _TWO, PROMPT)
        options = {"model": str(folder / f"{side}-model")}
        models[side] = prepare(load(**options, device="cpu"), options, _TWO, folder / side, list(images))
    classes = F.normalize(torch.randn(_CLASSES, clip.architecture["embed_dim"]), dim=-1)
    return Case(models, dict.fromkeys(models, classes), images)

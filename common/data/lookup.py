"""Find evaluation data by name, task and split: labelled pictures, and pictures with captions.

Shapes: B images, S image size, M images in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.data import catalogue
from common.data.account import Account
from common.data.catalogue import Entry
from common.data.classification import ClassificationSet, classification_set, own_set, own_split, split_folders
from common.data.embedded.splits import indices, pack, recipe_hash, scene, scenes_of
from common.data.embedded.tasks import PER_NAME, TASKS, embedded_task
from common.data.embedded.tasks import version as tasks_version
from common.data.embedded.twemoji import TEMPLATES, VIEW
from common.data.exported import PREFIX, ExportedSet, exported_splits
from common.data.loader import ShardLoader
from common.data.pictures import loader as picture_loader
from common.data.reader import Decoder, ShardDataset, count_samples
from common.data.retrieval import retrieval_set
from common.data.transforms import center_view
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer
from common.zeroshot import Template

Loader = Callable[[Preprocess, int, int], Iterable[Mapping[str, Any]]]
"""(preprocess, batch size, worker processes) -> batches {"image": float [B,3,S,S], "key": list[str], maybe "label"}.

A loader reads every picture once, prepared for the model that is to see it.
"""

REVISIONS = {"embedded": 2, "embedded-1": 1}
"""The revisions of the embedded benchmark that have zero-shot and retrieval splits, by their names as data.

The current one has the plain name. Revision 1 is there for the weights that were trained on it.
"""
EMBEDDED: dict[str, tuple[str, ...]] = {
    "zeroshot": ("test", "val", "unseen", "unseen-alone"),
    "retrieval": ("retrieval",),
    "linear-probe": ("test",),
    "training": ("train", "val"),
}
"""The splits of REVISIONS by task, the default first; "training" holds what a linear probe learns from."""
EMBEDDED_TASKS = {f"embedded-{task}": task for task in TASKS}
"""The few-shot tasks of ``common.data.embedded.tasks`` by their names in this file."""

PAPER_PIXELS = 224
"""The side of the smallest pictures on which the papers report."""


@dataclass(frozen=True)
class Place:
    """The paths of data that the suite does not generate itself.

    root: the folder of the catalogue's sets.  captions: Karpathy's file, for retrieval.
    class_names: one name a line, for a user's own pictures (default: their folders' or the table's).
    """

    root: str | None = None
    captions: str | None = None
    class_names: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Pictures of classes; the batches carry "label": long [B], places in ``class_names``.

    templates: prompts for the names, see ``common.zeroshot.Template``; none for a user's own pictures.
    metric: "accuracy" or "mean_per_class", the one that papers report.
    version: a hash that changes with the pictures.
    account: of the samples; its ``delivered`` stays 0 where the loader does not count them.
    size: how many pictures there are, of a loader that also takes ``sampler``, the places to read; else None.
    """

    split: str
    class_names: Sequence[str]
    templates: Sequence[Template]
    metric: str
    loader: Loader
    version: str = ""
    account: Account = field(default_factory=Account)
    size: int | None = None

    def drawn(self, limit: int | None) -> list[int] | None:
        """The places of ``limit`` pictures, drawn once for all; None: of all, or of the first ones.

        The first pictures of a folder are those of its first class. Shards hold theirs in no order of classes.
        """
        if limit is None or self.size is None or limit >= self.size:
            return None
        return sorted(np.random.default_rng(0).permutation(self.size)[:limit].tolist())


@dataclass(frozen=True)
class Captioned:
    """Pictures with one or more captions each: M lists, in the order in which ``loader`` gives the pictures."""

    split: str
    captions: Sequence[Sequence[str]]
    loader: Loader
    version: str = ""
    account: Account = field(default_factory=Account)


def version_within(data: Labelled | Captioned, limit: int | None) -> str:
    """The version of the pictures read within a limit: another one where they are drawn, unlike the first ones."""
    drawn = isinstance(data, Labelled) and data.drawn(limit) is not None
    return f"{data.version}, {limit} drawn" if drawn else data.version


def splits_of(name: str, task: str) -> tuple[str, ...]:
    """The splits of a data set for a task, the default one first.

    name: "embedded", "embedded-1", a few-shot task ("embedded-sketch"), one of the catalogue, perhaps with its protocol
    ("dtd@coop"), "webdataset:FOLDER" of a set that CLIP_benchmark exported, or the path of a folder with one folder a
    class, of one with folders train, val and test of such folders, or of a .csv or .tsv table (one that is called like
    a set is ``./food101``).
    ValueError: no such data, or not for this task.
    """
    if not name:  # as a path it would be the working directory
        raise ValueError("the name of the data is empty, as of a variable that is not set; name a set, folder or table")
    tasks = EMBEDDED if name in REVISIONS else _tasks(name)
    if task not in tasks:
        raise ValueError(f"{name} has no pictures for {task!r}; it has them for {sorted(tasks)}")
    return tasks[task]


def _tasks(name: str) -> dict[str, tuple[str, ...]]:
    if name.startswith(PREFIX):
        splits = exported_splits(name)
        training = tuple(split for split in ("train", "val") if split in splits)
        return {"zeroshot": splits} | ({"linear-probe": splits[:1], "training": training} if "train" in splits else {})
    if _own(name):
        # The parts of undivided pictures are for training alone, so that evaluation goes on reading all of them.
        training = {"training": ("train", "val")}
        if not split_folders(name):
            return {"zeroshot": ("all",)} | training
        return {"zeroshot": ("test", "val", "train"), "linear-probe": ("test",)} | training
    splits = PER_NAME if name in EMBEDDED_TASKS else _entry(name).splits
    splits = sorted(splits, key=("test", "val", "train").index)
    if name not in EMBEDDED_TASKS and _entry(name).task == "retrieval":
        return {"retrieval": tuple(splits)}
    tasks = {"zeroshot": tuple(splits)}
    if "train" not in splits:
        return tasks
    training = tuple(split for split in ("train", "val") if split in splits)
    return tasks | {"linear-probe": ("test",), "training": training}


def _own(name: str) -> bool:
    """Whether a user's own data is meant: a path, but not a folder that only has a known set's name."""
    return name.partition("@")[0] not in (*catalogue.names(), *EMBEDDED_TASKS) and Path(name).expanduser().exists()


def _entry(name: str) -> Entry:
    known, _, protocol = name.partition("@")
    if known not in catalogue.names():
        near = catalogue.guess(known, (*REVISIONS, *EMBEDDED_TASKS))
        raise ValueError(
            f"no data called {name!r}, and no file or folder; {near}there are "
            f"{', '.join([*REVISIONS, *EMBEDDED_TASKS, *catalogue.names()])}"
        )
    return catalogue.entry(known, protocol or "mlip")


def scale_of(name: str, image_size: int) -> str:
    """The scale of results on a data set (see ``splits_of``) of a model for pictures of so many pixels.

    "embedded": pictures that the suite draws, or a tower smaller than any paper's; "own data": a user's; "paper".
    """
    if name in REVISIONS or name in EMBEDDED_TASKS:
        return "embedded"
    if _own(name):
        return "own data"
    return "paper" if image_size >= PAPER_PIXELS else "embedded"


def source(name: str, task: str, split: str | None = None, place: Place | None = None) -> Labelled | Captioned:
    """The pictures of a split (None: the default one) for a task, Captioned for "retrieval"; see ``splits_of``.

    place: where data of the catalogue lies. ValueError: no such data, task or split, with those that there are; one
    class alone; data that is missing or incomplete, and what to download.
    """
    splits, place = splits_of(name, task), place or Place()
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r} for {task}; it has {list(splits)}")
    if place.class_names is not None and not _own(name):
        raise ValueError(
            f"--class-names {place.class_names} is for a folder or table of your own; {name} has names, leave it out"
        )
    if name in REVISIONS:
        return (_embedded_captions if task == "retrieval" else _embedded_classes)(split, REVISIONS[name])
    if name.startswith(PREFIX):
        exported = ExportedSet(name, split)
        names, templates = exported.class_names, exported.templates
        return Labelled(
            split, names, templates, "accuracy", exported.loader, version=exported.version, account=exported.account
        )
    if task != "retrieval":
        pictures = labelled_set(name, split, place)
        if len(pictures.class_names) < 2:
            raise ValueError(
                f"{name} has one class alone, {pictures.class_names[0]!r}, so every answer would be right; give two or "
                "more, each as a folder of its own"
            )
        if name in EMBEDDED_TASKS:
            return _labelled(split, pictures, tasks_version())
        labelled = _labelled(split, pictures, pictures.version)
        return replace(labelled, templates=()) if _own(name) else labelled
    entry, root = _entry(name), _root(name, place)
    if place.captions is None:
        raise ValueError(f"{entry.title}: give --captions, the path of Karpathy's json file. It needs {entry.get}")
    pictures = retrieval_set(entry, root, place.captions, split)
    return Captioned(split, pictures.captions, partial(picture_loader, pictures), version=pictures.version)


def labelled_set(name: str, split: str, place: Place | None = None) -> ClassificationSet:
    """The pictures of a split as a data set, for training.

    name: see ``splits_of``. ValueError: no such data or split, or data that is missing, and what to download.
    """
    place = place or Place()
    if name in REVISIONS:
        like = {1: "embedded-plain", 2: "embedded-shapes"}[REVISIONS[name]]
        raise ValueError(
            f"{name} lies in shards, which EmbeddedDataModule(revision={REVISIONS[name]}) reads; {like} has its like"
        )
    if name.startswith(PREFIX):
        raise ValueError(f"{name} lies in shards; ShardDataModule with captions: false trains on shards")
    if name in EMBEDDED_TASKS:
        return embedded_task(EMBEDDED_TASKS[name], split)
    if _own(name):
        names = place.class_names
        return own_set(name, names) if split == "all" else own_split(name, split, names)
    return classification_set(_entry(name), _root(name, place), split)


def _root(name: str, place: Place) -> str:
    if place.root is None:
        entry = _entry(name)
        raise ValueError(
            f"{entry.title}: give --root or set EFFCLIP_DATA to the folder with the data sets. It needs {entry.get}"
        )
    return place.root


def _labelled(split: str, pictures: ClassificationSet, version: str) -> Labelled:
    loader = partial(picture_loader, pictures)
    names, templates = pictures.class_names, pictures.templates
    return Labelled(split, names, templates, pictures.metric, loader, version, copy(pictures.account), len(pictures))


def _embedded_loader(split: str, revision: int, preprocess: Preprocess, batch_size: int, workers: int) -> ShardLoader:
    """Pictures of a revision at any size, without texts; sizes in its VIEWS are drawn, others resized."""
    view = preprocess.size if preprocess.size in scenes_of(revision).VIEWS else VIEW
    folder = pack(split, view=view, revision=revision)
    shards = count_samples([str(path) for path in sorted(folder.glob("*.tar"))])
    transform = partial(center_view, image_size=preprocess.size, view=view)
    dataset = ShardDataset(shards, Decoder(transform, preprocess, Tokenizer(), False), batch_size, max_damaged=0.0)
    return ShardLoader(dataset, workers, dataset.evaluation_batches(max(1, workers)))


def _embedded_classes(split: str, revision: int) -> Labelled:
    """A labelled split of the embedded benchmark.

    "train", "val" and "test" show the seen names and are scored among them. "unseen" shows the held-out names,
    scored among all names; "unseen-alone" are the same pictures, scored among the held-out names.
    """
    class_names = scenes_of(revision).class_names
    names = class_names({"unseen": "all", "unseen-alone": "unseen"}.get(split, "seen"))
    first = len(class_names("seen")) if split == "unseen-alone" else 0

    def loader(preprocess: Preprocess, batch_size: int, workers: int) -> Iterable[Mapping[str, Any]]:
        batches = _embedded_loader(split.removesuffix("-alone"), revision, preprocess, batch_size, workers)
        return ({**batch, "label": batch["label"] - first} for batch in batches) if first else batches

    return Labelled(split, names, TEMPLATES, "accuracy", loader, recipe_hash(revision=revision))


def _embedded_captions(split: str, revision: int) -> Captioned:
    """Pictures of the embedded benchmark, each with one caption that no other picture has."""

    def loader(preprocess: Preprocess, batch_size: int, workers: int) -> Iterable[Mapping[str, Any]]:
        # Several readers would interleave their shards; one keeps the order.
        return _embedded_loader(split, revision, preprocess, batch_size, min(workers, 1))

    captions = [[scene(split, index, revision)[1]] for index in indices(split, revision)]
    return Captioned(split, captions, loader, recipe_hash(revision=revision))

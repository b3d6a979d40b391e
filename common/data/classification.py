"""Labelled pictures with class names and prompts: the catalogue's sets and a user's own.

Shapes: B pictures of a batch, M pictures in all, C classes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from common.data import catalogue
from common.data.catalogue import METRICS, Entry
from common.data.files import is_system_file
from common.data.pictures import PictureSet, loader
from common.data.sources import DOWNLOADS, READERS, Samples, few_shot, natural, read_csv, read_folder
from common.data.tables import SEPARATORS, read_text
from common.zeroshot import PHOTO

__all__ = ["ClassificationSet", "classification_set", "few_shot", "loader", "own_set", "own_split"]

_log = logging.getLogger(__name__)
DRAWN = {"test": 0.2, "val": 0.1}
"""The share of each class's training pictures that stands for a split which a user's own data lacks."""


class ClassificationSet(PictureSet):
    """M labelled pictures: item i is (PIL image in RGB, label).

    labels: M numbers in [0, C).  class_names: C of them.  templates: prompts with ``{}``.
    metric: "accuracy" or "mean_per_class".  keys: M names, unique.
    ValueError: an unknown metric, or labels that the names do not cover; see also PictureSet.
    """

    labels: list[int]

    def __init__(
        self,
        samples: Samples,
        root: str | Path,
        class_names: Sequence[str],
        templates: Sequence[str] = PHOTO,
        metric: str = "accuracy",
        prefix: str = "",
    ) -> None:
        super().__init__(samples.pictures, root, samples.labels, prefix, samples.border)
        if metric not in METRICS:
            raise ValueError(f"the metrics are {METRICS}, not {metric!r}")
        if len(class_names) != len(samples.names) or not 0 <= min(self.labels) <= max(self.labels) < len(class_names):
            raise ValueError(
                f"{len(class_names)} class names do not fit the {len(samples.names)} classes of {root} "
                f"(labels {min(self.labels)} to {max(self.labels)}); give one name a class, in their order"
            )
        self.class_names, self.templates, self.metric = list(class_names), tuple(templates), metric
        self.account = samples.account

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.picture(index), self.labels[index]

    def subset(self, indices: Sequence[int]) -> ClassificationSet:
        """The same classes with only these pictures, such as those of ``few_shot(dataset.labels, 16)``."""
        part = copy(self)
        for name in ("pictures", "labels", "keys"):
            setattr(part, name, [getattr(self, name)[index] for index in indices])
        return part


def classification_set(
    entry: Entry | str,
    root: str | Path,
    split: str = "test",
    protocol: str = "mlip",
    download: bool = False,
) -> ClassificationSet:
    """A set of the catalogue; incomplete data is refused.

    entry: its name, or an Entry (``protocol`` then has no effect).
    root: the folder of the data sets, laid out as ``Entry.get`` describes.
    split: "train", "val" (where there is one), "test", or several, as in "train+val".
    download: fetch the data with torchvision first, where its class can.
    ValueError: an unknown set or split; data missing, incomplete or not of this set, and what to download.
    """
    if isinstance(entry, str):
        entry = catalogue.entry(entry, protocol)
    if entry.task != "classification":
        raise ValueError(
            f"{entry.title} is for {entry.task}; classes have {', '.join(catalogue.names('classification'))}"
        )
    parts = split.split("+")
    if len(set(parts)) < len(parts) or not set(parts) <= set(entry.splits):
        raise ValueError(f"{entry.title} has the splits {list(entry.splits)} and sums of them, not {split!r}")
    if download and entry.reader not in DOWNLOADS:
        raise ValueError(f"{entry.title} cannot be downloaded by a program; get {entry.get}")
    root = Path(root).expanduser().absolute()
    try:
        samples = [_part(entry, root, part, download) for part in parts]
        names = entry.class_names or [entry.rename.get(name, readable(name)) for name in samples[0].names]
        if len(samples[0].names) != entry.num_classes:
            raise ValueError(f"{len(samples[0].names)} classes instead of {entry.num_classes}")
        pictures = [picture for part in samples for picture in part.pictures] if len(parts) > 1 else samples[0].pictures
        labels = [label for part in samples for label in part.labels]
        whole = Samples(pictures, labels, samples[0].names, samples[0].account, samples[0].border)
        for part in samples[1:]:
            whole.account.add(part.account)
        return ClassificationSet(whole, root, names, entry.templates, entry.metric, f"{split}/")
    except Exception as error:
        if not _is_about_data(error):
            raise
        reason, advice, _ = str(error).rstrip(".").partition(". You can use download=True")  # no option of ours
        wrong = f"is not in {root}" if advice and reason == "Dataset not found" else f"in {root}: {reason}"
        raise ValueError(f"{entry.title} ({split}) {wrong}. It needs {entry.get}") from error


def _is_about_data(error: Exception) -> bool:
    """Whether an error is what torchvision and scipy raise for missing and damaged files."""
    if isinstance(error, (ValueError, RuntimeError, OSError, KeyError)):
        return True
    from scipy.io.matlab import MatReadError  # takes a while, and a folder of pictures needs no scipy

    return isinstance(error, MatReadError)


def _part(entry: Entry, root: Path, split: str, download: bool) -> Samples:
    options: dict[str, Any] = {**entry.options, **entry.splits[split].options}
    if entry.reader == "split_json":
        options["split"] = split
    if download:
        options["download"] = True
    elif not root.is_dir():
        raise ValueError("there is no such folder")
    samples = READERS[entry.reader](root, **options)
    if len(samples.pictures) != entry.splits[split].count:
        raise ValueError(
            f"{len(samples.pictures)} pictures of {split!r} were found where {entry.splits[split].count} belong"
        )
    return samples


def own_set(
    path: str | Path,
    class_names: str | Path | None = None,
    templates: Sequence[str] = PHOTO,
    metric: str = "accuracy",
) -> ClassificationSet:
    """A user's own pictures: a folder with one folder a class, or a CSV with "path" and "label" or "class".

    path: the folder, or the .csv or .tsv file, to which its picture paths are relative.
    class_names: a text file with one name a line, in the order of the labels; of folders, in alphabetical
    order. By default the folders' names, or the classes that the CSV names, sorted.
    ValueError: nothing there, a folder that cannot be read, or names, labels and pictures that do not belong together.
    """
    path = Path(path).expanduser().absolute()
    names = None if class_names is None else _names_of(Path(class_names).expanduser().absolute())
    if not path.is_dir() and (not path.is_file() or path.suffix.lower() not in SEPARATORS):
        raise ValueError(f"{path} is neither a folder of class folders nor a .csv or .tsv file")
    if path.is_dir():
        samples = _read_folders(path)
        if names is not None:
            _check_order(path, samples.names, names)
    else:
        samples = read_csv(path, names)
    names = names or [readable(name) for name in samples.names]
    check_different(names, str(class_names or path))
    return ClassificationSet(samples, path if path.is_dir() else path.parent, names, templates, metric)


def split_folders(path: str | Path) -> tuple[str, ...]:
    """Which of train, val and test are folders of ``path``, where it holds train and no other folder; otherwise ()."""
    path = Path(path).expanduser()
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    folders = {name for name in folders if not is_system_file(name)}
    return tuple(sorted(folders)) if "train" in folders and folders <= {"train", *DRAWN} else ()


def own_split(path: str | Path, split: str, class_names: str | Path | None = None) -> ClassificationSet:
    """A split of a user's own pictures: "train", "val" or "test".

    path: a folder of folders train, val and test, each as ``own_set`` takes it, or undivided pictures, see ``own_set``.
    A split that is not there is drawn from the training pictures: DRAWN of each class, always the same ones.
    ValueError: as ``own_set``; a split with other classes than train, or a class with too few pictures to draw from.
    """
    path, folders = Path(path).expanduser(), split_folders(path)
    whole = own_set(path / "train" if folders else path, class_names)
    if split != "train" and split in folders:
        part = own_set(path / split, class_names)
        if part.class_names != whole.class_names:
            other = sorted(set(part.class_names) ^ set(whole.class_names))
            raise ValueError(f"{path / split} and {path / 'train'} differ in their classes, such as {other[0]!r}")
        return part
    return whole.subset(_drawn(whole, [name for name in DRAWN if name not in folders])[split])


def _drawn(pictures: ClassificationSet, splits: Sequence[str]) -> dict[str, list[int]]:
    """Ascending indices of "train" and of the given splits, which share no picture."""
    parts: dict[str, list[int]] = {name: [] for name in ("train", *splits)}
    members: dict[int, list[int]] = {}
    for index, label in enumerate(pictures.labels):
        members.setdefault(label, []).append(index)
    for label, indices in members.items():
        if len(indices) <= len(splits):
            raise ValueError(
                f"class {pictures.class_names[label]!r} of {pictures.root} has {len(indices)} pictures, too few to "
                f"draw {' and '.join(splits)} from; add some, or give folders of these names"
            )
        Random(f"splits/{label}").shuffle(indices)
        rest = indices
        for name in splits:
            count = max(1, round(DRAWN[name] * len(indices)))
            parts[name] += rest[:count]
            rest = rest[count:]
        parts["train"] += rest
    return {name: sorted(part) for name, part in parts.items()}


def _read_folders(path: Path) -> Samples:
    samples = read_folder(path, pictures=["."])
    if not samples.names:
        raise ValueError(f"{path} should hold one folder a class, with pictures in each; it holds no folder")
    loose = [file.name for file in path.iterdir() if file.is_file() and not is_system_file(file.name)]
    for name in sorted(loose):
        samples.account.ignore("kind that is not read", name)
    return samples


def _names_of(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"there is no class-name file {file}")
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"the class-name file {file} names no class; write one name a line, or leave it out")
    return names


def _check_order(path: Path, folders: Sequence[str], names: Sequence[str]) -> None:
    """Say how folders of numbers are ordered. ValueError: the order that the names are written in is not sure."""
    prose = [readable(name) for name in folders]
    if sorted(prose) == sorted(names) and prose != list(names):
        raise ValueError(f"the class-name file lists the folders of {path} in another order; leave it out, or sort it")
    if all(name.isdigit() for name in folders):
        _log.warning("%s: folders %s to %s are in the order of their numbers", path, folders[0], folders[-1])
    elif list(folders) != sorted(folders, key=natural):
        first = next(name for name, other in zip(folders, sorted(folders, key=natural), strict=True) if name != other)
        raise ValueError(
            f"whether the names are in the order of text or of numbers is not sure for the folders of {path} "
            f"({first} is out of order); pad the numbers with zeros, or give a table with path and class"
        )


def check_different(names: Sequence[str], where: str) -> None:
    """ValueError: a name stands there twice. ImageNet's 1,000 names may: two of its classes are called missile."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice and len(names) != 1000:
        raise ValueError(f"{where} names two classes {twice[0]!r}; merge them or give them different names")


def readable(name: str) -> str:
    """A class name as prose: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())

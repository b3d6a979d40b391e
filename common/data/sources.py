"""Readers of the on-disk formats in which labelled pictures are published.

A reader takes the root folder and an entry's options, and lists pictures, labels and class names; it opens no
picture. Missing or damaged data raises a ValueError, or an error of torchvision that the caller turns into one; the
message names the path.

Shapes: M pictures, C classes.
"""

from __future__ import annotations

import gzip
import inspect
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from common.data.account import Account
from common.data.files import is_system_file, pictures_below
from common.data.tables import read_json, read_table, read_text, text_cell
from common.zeroshot import imagenet_names


@dataclass(frozen=True)
class Samples:
    """M labelled pictures in the order of the data set.

    pictures: their paths, or their pixels as uint8 [H,W] or [H,W,3] where the set is stored as one array.
    labels: in [0, C).  names: the C class names in the data.
    account: the files that were ignored.  border: pixels at each edge that are no part of a picture.
    """

    pictures: Sequence[str | np.ndarray]
    labels: list[int]
    names: list[str]
    account: Account = field(default_factory=Account)
    border: int = 0


def few_shot(labels: Sequence[int], shots: int, seed: int = 0) -> list[int]:
    """Ascending indices of ``shots`` random samples per class (all samples where a class has fewer).

    For one seed, the 2 shots contain the 1 shot, the 4 shots the 2, and so on.
    ValueError: fewer than one shot.
    """
    if shots < 1:
        raise ValueError(f"{shots} shots leave nothing to learn from; take 1, 2, 4, 8 or 16")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = []
    for label, indices in members.items():
        Random(f"{seed}/{label}").shuffle(indices)
        chosen += indices[:shots]
    return sorted(chosen)


def missing_files(paths: Iterable[str]) -> list[str]:
    """The paths that do not exist; each folder is listed once, which is faster than a test per file."""
    paths = list(paths)
    present: set[str] = set()
    for folder in {os.path.dirname(path) for path in paths}:
        if os.path.isdir(folder):
            present.update(os.path.join(folder, name) for name in os.listdir(folder))
    return [path for path in paths if path not in present]


def first_there(root: Path, places: Sequence[str]) -> Path:
    """The first of several places under ``root`` that exists. ValueError: none does."""
    for place in places:
        if (root / place).exists():
            return root / place
    raise ValueError(f"there is no {' nor '.join(places)} in {root}")


def read_torchvision(root: Path, *, dataset: str, download: bool = False, **arguments: Any) -> Samples:
    """A set that torchvision reads: picture by picture (by its ``loader``), or as one array."""
    kind = _torchvision_class(dataset)
    if "loader" in inspect.signature(kind).parameters:
        data = kind(root, download=download, loader=str, **arguments)  # a "picture" is then its path
        samples = [data[index] for index in range(len(data))]
        return Samples([path for path, _ in samples], [int(label) for _, label in samples], list(data.classes))
    data = kind(root, download=download, **arguments)
    if hasattr(data, "data") and data.data.ndim == 4 and data.data.shape[1] == 3:  # STL-10: colours first
        return Samples(data.data.transpose(0, 2, 3, 1), data.labels.tolist(), list(data.classes))
    if hasattr(data, "data"):
        return Samples(data.data, data.targets, data.classes)
    # The pets have neither, and their public interface decodes a picture to read its label.
    return Samples([str(path) for path in data._images], data._labels, data.classes)


def _torchvision_class(name: str) -> type:
    from torchvision import datasets  # takes seconds, and a user's own pictures need none of its classes

    return getattr(datasets, name)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value: c2 before c10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def class_folders(root: Path, account: Account) -> list[str]:
    """The names of the class folders, numbers by value, others as text. ValueError: two names of one number."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    for name in [name for name in names if is_system_file(name)]:
        names.remove(name)
        account.ignore("system file", name)
    if len({os.path.realpath(root / name) for name in names}) < len(names):
        raise ValueError(f"two class folders of {root} are links to one folder; remove one of them")
    if not names or not all(name.isdigit() for name in names):
        return sorted(names)
    if len({int(name) for name in names}) < len(names):
        raise ValueError(f"two folders of {root} have one number, such as 1 and 01; rename one of them")
    return sorted(names, key=int)


def _imagenet_folders(subset: str) -> list[str]:
    """The class folders of ImageNet, or of a subset, as timm lists them."""
    from timm.data import ImageNetInfo  # takes seconds

    return ImageNetInfo(subset).label_names()


def read_folder(
    root: Path,
    *,
    pictures: Sequence[str],
    folders: str | None = None,
    some: bool = False,
    shots: int | None = None,
    take: str = "all",
    seed: int = 0,
) -> Samples:
    """One folder per class, labelled in the order of the folders' names; names that are numbers, by their value.

    folders: a class list of timm, such as "imagenet-1k"; its ids must be the folders.
    some: a part of ImageNet's ids is enough; the class names are then ImageNet's.
    shots, take: "sampled" takes that many of each class at random, "rest" the others, "all" everything.
    """
    base, account = first_there(root, pictures), Account()
    names = class_folders(base, account)
    known = _imagenet_folders(folders) if folders else names
    if not (set(names) <= set(known) if some else set(names) == set(known)):
        raise ValueError(
            f"{base} has {len(names)} folders ({', '.join(names[:3])}, ...), which are not the classes of {folders}"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = [str(file) for file in pictures_below(base / name, account)]
        if not files:
            raise ValueError(f"the class folder {base / name} holds no picture{account.ignored_files()}; remove it")
        paths += files
        labels += [label] * len(files)
    if take != "all":
        chosen = set(few_shot(labels, shots, seed))
        kept = [index for index in range(len(paths)) if (index in chosen) == (take == "sampled")]
        paths, labels = [paths[index] for index in kept], [labels[index] for index in kept]
    if some:
        words = dict(zip(known, imagenet_names(), strict=True))
        names = [words[name] for name in names]
    return Samples(paths, labels, names, account)


def read_lists(root: Path, *, file: Sequence[str], classes: Sequence[str], pictures: Sequence[str]) -> Samples:
    """SUN397: a text file of pictures such as /a/arch/sun_x.jpg; ``classes`` lists their folders.

    A folder /a/apartment_building/outdoor is called "outdoor apartment_building".
    """
    folders = read_text(first_there(root, classes)).split()
    labels = {folder: label for label, folder in enumerate(folders)}
    paths = ["/" + path.lstrip("/") for path in read_text(first_there(root, file)).split()]
    unknown = [path for path in paths if os.path.dirname(path) not in labels]
    if unknown:
        raise ValueError(f"{unknown[0]} in {first_there(root, file)} belongs to no class of {classes[0]}")
    base = first_there(root, pictures)
    return Samples(
        [str(base / path.lstrip("/")) for path in paths],
        [labels[os.path.dirname(path)] for path in paths],
        [" ".join(reversed(folder.split("/")[2:])) for folder in folders],
    )


def read_split_json(root: Path, *, file: Sequence[str], pictures: Sequence[str], split: str) -> Samples:
    """CoOp's ``split_zhou_*.json``: {split: [[path, label, class name], ...]}."""
    path = first_there(root, file)
    wanted = 'CoOp\'s {"train": [[path, label, class name], ...], ...}'
    data = read_json(path, dict, wanted)
    rows = [row for part in data.values() if isinstance(part, list) for row in part]
    wrong = [row for row in rows if not (isinstance(row, list) and [type(x) for x in row] == [str, int, str])]
    if wrong or split not in data:
        holds = f"holds rows such as {str(wrong[0])[:60]}" if wrong else f"has the keys {list(data)[:5]}, not {split!r}"
        raise ValueError(f"{path} {holds}; it should be {wanted}")
    names: dict[int, str] = {}
    for _, label, name in rows:
        if names.setdefault(label, name) != name:
            raise ValueError(f"{path} calls the class {label} both {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path} has the splits {list(data)} and {len(names)} labels up to {max(names, default=None)}")
    base = first_there(root, pictures)
    return Samples(
        [str(base / picture) for picture, _, _ in data[split]],
        [label for _, label, _ in data[split]],
        [names[label] for label in range(len(names))],
    )


def read_cub(root: Path, *, folders: Sequence[str], training: bool) -> Samples:
    """CUB-200-2011: text files of (number, value) lines, which name pictures, classes and the pictures of a split."""
    base = first_there(root, folders)

    def column(name: str) -> dict[str, str]:
        lines = [line.split(maxsplit=1) for line in read_text(first_there(base, [name])).splitlines() if line.strip()]
        short = [line for line in lines if len(line) != 2]
        if short:
            raise ValueError(f"{base / name} has the line {short[0][0]!r}; every line should be a number and a value")
        return {number: value.strip() for number, value in lines}

    paths, classes, numbers, split = map(
        column, ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    order = {number: label for label, number in enumerate(classes)}
    chosen = [picture for picture, flag in split.items() if (flag == "1") == training]
    unknown = [picture for picture in chosen if picture not in paths or numbers.get(picture) not in order]
    if unknown:
        raise ValueError(f"picture {unknown[0]} in {base} has no path or no class")
    return Samples(
        [str(base / "images" / paths[picture]) for picture in chosen],
        [order[numbers[picture]] for picture in chosen],
        [name.partition(".")[2] or name for name in classes.values()],  # 001.Black_footed_Albatross
    )


def read_objectnet(root: Path, *, folders: Sequence[str]) -> Samples:
    """ObjectNet's classes that ImageNet has too; its pictures have a red border of two pixels, which is no part."""
    base, account = first_there(root, folders), Account()
    labels_of = read_json(first_there(base, ["mappings/folder_to_objectnet_label.json"]), dict)
    shared = read_json(first_there(base, ["mappings/objectnet_to_imagenet_1k.json"]), dict)
    names = sorted(folder for folder, label in labels_of.items() if label in shared)
    files = [[str(file) for file in pictures_below(base / "images" / name, account)] for name in names]
    labels = [label for label, members in enumerate(files) for _ in members]
    classes = [labels_of[name].lower() for name in names]
    return Samples([file for members in files for file in members], labels, classes, account, border=2)


def read_idx(root: Path, *, dataset: str, folders: Sequence[str], prefix: str, download: bool = False) -> Samples:
    """Idx files of an MNIST-like set, with or without ``.gz``, each in the first of ``folders`` that has it.

    dataset: torchvision's class, which has the class names.  prefix: the start of the split's file names.
    """
    kind = _torchvision_class(dataset)
    if download:
        kind(root, download=True)
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    images, labels = (
        _idx(first_there(root, [f"{folder}{name}{end}" for folder in folders for end in ("", ".gz")]), dimensions)
        for name, dimensions in zip(names, (3, 1), strict=True)
    )
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} pictures of {prefix!r} in {root} have {len(labels)} labels")
    return Samples(images, labels.tolist(), list(kind.classes))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        data = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    head = 4 + 4 * dimensions
    magic, *shape = struct.unpack(f">{dimensions + 1}I", data[:head].ljust(head, b"\0"))
    if magic != 0x800 + dimensions or math.prod(shape) != len(data) - head:  # 8: bytes
        raise ValueError(f"{path} is no whole idx file of bytes in {dimensions} dimensions")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_csv(path: Path, names: list[str] | None) -> Samples:
    """A CSV (or .tsv) whose header has "path" and either "label" (a number) or "class" (a name).

    Paths are relative to the file. names: the classes in the order of the labels, needed for "label"; for
    "class" they are by default those that occur, sorted.
    """
    rows = list(read_table(path))
    columns = set(rows[0].cells) if rows else set()
    if not {"path"} <= columns or not {"label", "class"} & columns:
        raise ValueError(f"{path} needs rows under a header with 'path' and 'label' or 'class', not {sorted(columns)}")
    column = "label" if "label" in columns else "class"
    values = [text_cell(path, row, column) for row in rows]
    paths = [text_cell(path, row, "path") for row in rows]
    for row, picture, value in zip(rows, paths, values, strict=True):
        if not picture or not value:
            raise ValueError(f"line {row.number} of {path} has no path or no {column}")
        if "://" in picture:
            raise ValueError(f"line {row.number} of {path}: {picture} is a URL; download the pictures first")
    if column == "label" and names is None:
        raise ValueError(f"{path} has numbers for labels; give a file with one class name a line")
    names = sorted(set(values)) if names is None else names
    order = {str(label) if column == "label" else name: label for label, name in enumerate(names)}
    strangers = sorted({str(value) for value in values if value not in order})
    if strangers:
        counted = f", which have the labels 0 to {len(names) - 1}" if column == "label" else ""
        raise ValueError(f"{path} uses {', '.join(strangers[:3])}, not among the {len(names)} classes{counted}")
    return Samples([str(path.parent / picture) for picture in paths], [order[value] for value in values], names)


READERS: dict[str, Callable[..., Samples]] = {
    "torchvision": read_torchvision,
    "folder": read_folder,
    "lists": read_lists,
    "split_json": read_split_json,
    "idx": read_idx,
    "cub": read_cub,
    "objectnet": read_objectnet,
}
"""The readers by their names in the catalogue."""
DOWNLOADS = ("torchvision", "idx")
"""Readers that can download the data."""

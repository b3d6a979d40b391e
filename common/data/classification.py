"""Labelled pictures with class names and prompts: the catalogue's sets and a user's own.

Shapes: B pictures of a batch, M pictures in all, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.io.matlab import MatReadError

from common.data import catalogue
from common.data.catalogue import METRICS, Entry
from common.data.files import files_below
from common.data.pictures import PictureSet, loader
from common.data.sources import DOWNLOADS, READERS, Samples, few_shot, read_csv, read_folder
from common.zeroshot import PHOTO

__all__ = ["ClassificationSet", "classification_set", "few_shot", "loader", "own_set"]


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
        super().__init__(samples.pictures, root, samples.labels, prefix)
        if metric not in METRICS:
            raise ValueError(f"the metrics are {METRICS}, not {metric!r}")
        if len(class_names) != len(samples.names) or not 0 <= min(self.labels) <= max(self.labels) < len(class_names):
            raise ValueError(
                f"{len(class_names)} class names do not fit the {len(samples.names)} classes of {root} "
                f"(labels {min(self.labels)} to {max(self.labels)}); give one name a class, in their order"
            )
        self.class_names, self.templates, self.metric = list(class_names), tuple(templates), metric

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
        whole = Samples(pictures, labels, samples[0].names)
        return ClassificationSet(whole, root, names, entry.templates, entry.metric, f"{split}/")
    # torchvision and scipy raise these for missing and damaged files.
    except (ValueError, RuntimeError, OSError, KeyError, MatReadError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{entry.title} ({split}) in {root}: {reason}. It needs {entry.get}") from error


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
    names = None
    if class_names is not None:
        file = Path(class_names).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no class-name file {file.absolute()}")
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if path.is_dir():
        for _ in files_below(path, links=True):
            pass  # only to refuse what cannot be read: torchvision passes over it
        try:
            samples = read_folder(path, pictures=["."])
        except OSError as error:
            raise ValueError(f"{path} should hold one folder a class, with pictures in each: {error}") from error
        return ClassificationSet(samples, path, names or list(map(readable, samples.names)), templates, metric)
    if not path.is_file() or path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path} is neither a folder of class folders nor a .csv or .tsv file")
    samples = read_csv(path, names)
    return ClassificationSet(samples, path.parent, names or list(map(readable, samples.names)), templates, metric)


def readable(name: str) -> str:
    """A class name as prose: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())

"""The catalogue of evaluation sets: one YAML file per set, in the folder ``catalogue`` beside this file.

The top level of a file describes the set under the protocol "mlip", which is MLIP's Table 11: the published
splits, and mean accuracy per class where that table uses it. The section ``coop`` holds the differences under the
protocol of CoOp and its followers (Patch Ranking among them): the ``split_zhou_*.json`` files, plain accuracy, one
prompt. A set without that section is the same under both protocols.

ImageNet's prompts come from open_clip; this project wrote the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from common.zeroshot import imagenet_names, imagenet_templates

PROTOCOLS = ("mlip", "coop")
METRICS = ("accuracy", "mean_per_class")
TASKS = ("classification", "retrieval")


@dataclass(frozen=True)
class Split:
    """One split: the number of its pictures, and the reader's arguments for it."""

    count: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One evaluation set under one protocol.

    name: its key in the catalogue.  title: its name in tables.  task: one of TASKS.
    reader: a key of ``common.data.sources.READERS``, or "karpathy" for retrieval; options: its arguments.
    splits: by name; "train" and "val" never share a picture.
    metric: one of METRICS, None for retrieval.  num_classes: 0 for retrieval.
    class_names: in the order of the labels; None: the names in the data, with spaces for underscores.
    rename: better words for some of the names in the data.
    templates: prompts with ``{}`` in place of the name.
    get: what to download, and its place under the root.
    """

    name: str
    title: str
    protocol: str
    reader: str
    options: Mapping[str, Any]
    splits: Mapping[str, Split]
    get: str
    task: str = "classification"
    metric: str | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()


def names(task: str | None = None) -> list[str]:
    """The names of all sets, or of one task's, in alphabetical order. ValueError: no such task."""
    if task is not None and task not in TASKS:
        raise ValueError(f"there are sets for {TASKS}, not for {task!r}")
    result = sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))
    return [name for name in result if task is None or entry(name).task == task]


def entry(name: str, protocol: str = "mlip") -> Entry:
    """The set ``name`` under a protocol. ValueError: no such set or protocol; the message lists them."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"the protocols are {PROTOCOLS}, not {protocol!r}")
    if name not in names():
        raise ValueError(f"{name!r} is not in the catalogue; {guess(name)}it has {', '.join(names())}")
    data = yaml.safe_load((_folder() / f"{name}.yaml").read_text())
    coop = data.pop("coop", {})
    if protocol == "coop":
        data |= coop
    splits = {
        split: Split(options["count"], {key: value for key, value in options.items() if key != "count"})
        for split, options in data.pop("splits").items()
    }
    class_names = _words(data.pop("class_names", None), imagenet_names)
    templates = _words(data.pop("templates", ()), imagenet_templates)
    return Entry(name=name, protocol=protocol, splits=splits, class_names=class_names, templates=templates, **data)


def guess(name: str, others: Sequence[str] = ()) -> str:
    """The part of an error message that names the set nearest to ``name``; others: names beside the catalogue's."""
    near = get_close_matches(name, [*names(), *others], 1)
    return f"did you mean {near[0]}? " if near else ""


def _folder() -> Traversable:
    return files("common.data") / "catalogue"


def _words(written: list[str] | str | None, imagenet: Callable[[], tuple[str, ...]]) -> tuple[str, ...] | None:
    """The words of a YAML list; the word "imagenet" in place of a list means open_clip's."""
    if written == "imagenet":
        return imagenet()
    return None if written is None else tuple(written)

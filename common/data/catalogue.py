"""The catalogue of evaluation sets: one YAML file a set, in the folder ``catalogue`` beside this file.

A file's top level describes the set as MLIP's Table 11 uses it (protocol "mlip"): the published splits, and
mean accuracy per class where that table says so. A section ``coop`` holds what differs in the protocol of
CoOp and its followers, Patch Ranking among them: the ``split_zhou_*.json`` files, plain accuracy, one prompt.
A set without that section is the same under both names.

The wording of the prompts is this project's own, ImageNet's apart, which come from open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from common.zeroshot import IMAGENET_NAMES, IMAGENET_TEMPLATES

PROTOCOLS = ("mlip", "coop")
METRICS = ("accuracy", "mean_per_class")
TASKS = ("classification", "retrieval")


@dataclass(frozen=True)
class Split:
    """One split: how many pictures it must have, and what the reader needs to find it."""

    count: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """All that is known about one evaluation set under one protocol.

    name: its key in the catalogue.  title: as it is written in tables.  task: one of TASKS.
    reader: a key of ``common.data.sources.READERS``, or "karpathy" for retrieval; options: its arguments.
    splits: by name; "train" and "val" never share a picture.
    metric: one of METRICS, None for retrieval.  num_classes: 0 for retrieval.
    class_names: in the order of the labels; None: what the data itself says, underscores as spaces.
    rename: better words for some of those names.
    templates: prompts with ``{}`` in place of the name.
    get: what to download, and where under the root it belongs.
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
    """Keys of the sets of one task, or of all, in alphabetical order. ValueError: no such task."""
    if task is not None and task not in TASKS:
        raise ValueError(f"there are sets for {TASKS}, not for {task!r}")
    found = sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))
    return [name for name in found if task is None or entry(name).task == task]


def entry(name: str, protocol: str = "mlip") -> Entry:
    """The set called ``name`` under a protocol. ValueError: no such set or protocol, with those there are."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"the protocols are {PROTOCOLS}, not {protocol!r}")
    if name not in names():
        raise ValueError(f"{name!r} is not in the catalogue; it has {', '.join(names())}")
    data = yaml.safe_load((_folder() / f"{name}.yaml").read_text())
    coop = data.pop("coop", {})
    if protocol == "coop":
        data |= coop
    splits = {
        split: Split(options["count"], {key: value for key, value in options.items() if key != "count"})
        for split, options in data.pop("splits").items()
    }
    class_names = _words(data.pop("class_names", None), IMAGENET_NAMES)
    templates = _words(data.pop("templates", ()), IMAGENET_TEMPLATES)
    return Entry(name=name, protocol=protocol, splits=splits, class_names=class_names, templates=templates, **data)


def _folder() -> Traversable:
    return files("common.data") / "catalogue"


def _words(written: list[str] | str | None, imagenet: tuple[str, ...]) -> tuple[str, ...] | None:
    """The words of a YAML list; the single word "imagenet" stands for open_clip's."""
    if written == "imagenet":
        return imagenet
    return None if written is None else tuple(written)

"""Labelled sets in WebDataset form, as CLIP_benchmark exports them: ``--data webdataset:FOLDER``.

The folder (or URL) holds ``classnames.txt``, ``zeroshot_classification_templates.txt`` and, for every split,
``SPLIT/nshards.txt`` with ``SPLIT/0.tar``, ``SPLIT/1.tar``, ...; a sample is a picture and its label in ``cls``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

from common.data.account import Account
from common.data.complete import compare_sizes
from common.data.loader import ShardLoader
from common.data.reader import Decoder, ShardDataset, count_samples
from common.data.tables import read_text
from common.data.tar import is_remote, open_url
from common.data.transforms import eval_transform
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer

PREFIX = "webdataset:"
SPLITS = ("test", "val", "train")


class ExportedSet:
    """One split of an exported set.

    class_names, templates: the set's own, ``{}`` in place of the name.  version: a hash that changes with the shards.
    account: what became of the samples that were read so far.
    ValueError: a file of the set is missing, or it is no set for classification.
    """

    def __init__(self, name: str, split: str) -> None:
        self.folder = folder_of(name)
        kind = self._words("dataset_type.txt", "classification")[0]
        if kind != "classification":
            raise ValueError(f"{self.folder} is a set for {kind}; only sets for classification are read")
        self.class_names = self._words("classnames.txt")
        templates = self._words("zeroshot_classification_templates.txt", "a photo of a {c}.")
        self.templates = tuple(template.replace("{c}", "{}") for template in templates)
        shards = self._words(f"{split}/nshards.txt")[0]
        if not shards.isdigit() or not int(shards):
            raise ValueError(f"{self.folder}/{split}/nshards.txt should be the number of shards, not {shards!r}")
        self.urls = [f"{self.folder}/{split}/{number}.tar" for number in range(int(shards))]
        missing = [url for url in self.urls if not is_remote(url) and not Path(url).is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {shards} shards are missing, first {missing[0]}; export the set again")
        compare_sizes(self.urls)
        self.account = Account()

    def _words(self, name: str, default: str | None = None) -> list[str]:
        path = f"{self.folder}/{name}"
        try:
            if is_remote(path):
                with closing(open_url(path)) as stream:
                    text = stream.read().decode("utf-8-sig")
            else:
                text = read_text(Path(path))
        except OSError as error:
            if default is not None:
                return [default]
            raise ValueError(f"{path} cannot be read ({error}); export the set again, with class names") from error
        lines = [line.strip() for line in text.strip().splitlines()]
        if not lines or not all(lines):
            raise ValueError(f"{path} has an empty line; every line is one entry")
        return lines

    @property
    def version(self) -> str:
        """A hash of every shard's path, size and time (of a remote one: its address), and of the names."""
        facts: list[Any] = [self.class_names]
        for url in self.urls:
            status = None if is_remote(url) else os.stat(url)
            facts.append((url, status and (status.st_size, status.st_mtime_ns)))
        return sha256(repr(facts).encode()).hexdigest()[:16]

    def loader(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[Mapping[str, Any]]:
        """Every sample once, with "label"; see ``common.data.lookup.Loader``. ValueError: a sample is unusable."""
        decoder = Decoder(eval_transform(preprocess), preprocess, Tokenizer(), False, len(self.class_names))
        dataset = ShardDataset(count_samples(self.urls), decoder, batch_size, max_damaged=0.0)
        yield from ShardLoader(dataset, workers, None)
        self.account.add(dataset.account())


def folder_of(name: str) -> str:
    """The folder or URL of ``webdataset:FOLDER``."""
    folder = name.removeprefix(PREFIX)
    return folder.rstrip("/") if is_remote(folder) else str(Path(folder).expanduser().absolute())


def exported_splits(name: str) -> tuple[str, ...]:
    """The splits of an exported set. ValueError: there is none."""
    folder = folder_of(name)
    if is_remote(folder):
        return SPLITS
    splits = tuple(split for split in SPLITS if Path(folder, split, "nshards.txt").is_file())
    if not splits:
        raise ValueError(
            f"{folder} holds no exported set: there is no test/nshards.txt; give the folder that "
            "clip_benchmark_export_wds wrote"
        )
    return splits

"""WebDataset shards -> batches, for one of several readers. A reader is one worker of one rank.

webdataset parses the tar files. This file assigns shards to readers, orders and decodes samples, and counts damage:
webdataset's own stages repeat one order every epoch, look for the rank inside the worker, and decode pickles.

Shapes: B samples, T tokens, H height, W width.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext, tarfile_samples

from common.data.packing import read_manifest
from common.data.transforms import Transform, to_batch
from common.tokenizer import Tokenizer

PICTURES = ("jpg", "jpeg", "png", "webp")
WANTED = (*PICTURES, "txt", "json", "cls")

_log = logging.getLogger(__name__)
_GRACE = 1000  # the fraction of damage is compared with the limit after this many samples, and at the end of a pass


class Shard(NamedTuple):
    """A shard's path or URL and its number of samples (None: unknown)."""

    url: str
    samples: int | None


def expand(pattern: str, allow_pipe: bool = False) -> list[str]:
    """Paths and URLs of a pattern with ``{000..059}`` braces and ``${VARIABLES}``.

    ValueError: a variable is not set, a ``pipe:`` command was not allowed, or local files do not exist.
    """
    unset = [name for name in re.findall(r"\$\{(\w+)\}", pattern) if name not in os.environ]
    if unset:
        raise ValueError(f"{pattern!r}: set the environment variable {unset[0]} to the folder of the shards")
    urls = list(braceexpand(os.path.expanduser(os.path.expandvars(pattern))))
    if not allow_pipe and any(url.startswith("pipe:") for url in urls):
        raise ValueError(f"{pattern!r} runs a shell command; set allow_pipe: true if you trust this configuration")
    missing = [url for url in urls if ":" not in url and not Path(url).is_file()]
    if missing:
        where = Path(missing[0]).absolute()
        raise ValueError(f"{len(missing)} of {len(urls)} shards of {pattern!r} are missing, first {where}")
    return urls


def count_samples(urls: Sequence[str]) -> list[Shard]:
    """Each shard with its number of samples, from ``manifest.json`` beside it, or else from the tar headers.

    The number of a remote shard stays None.
    """
    shards = []
    known = manifests(urls)
    for url in urls:
        entry = known.get(Path(url).parent, {"shards": {}})["shards"].get(Path(url).name)
        shards.append(Shard(url, entry["samples"] if entry else None if ":" in url else _count_headers(url)))
    return shards


def manifests(urls: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """The manifest of every folder of local shards that has one."""
    folders = {Path(url).parent for url in urls if ":" not in url}
    return {folder: manifest for folder in sorted(folders) if (manifest := read_manifest(folder)) is not None}


def _count_headers(path: str) -> int:
    keys = set()
    try:
        with tarfile.open(path) as tar:
            keys.update(base_plus_ext(member.name)[0] for member in tar if _wanted(member.name))
    except tarfile.ReadError as error:  # a truncated shard: the reader will count the damage
        _log.warning("%s: %s", path, error)
    return len(keys)


def _wanted(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in WANTED


class Damage:
    """Counts unusable samples, and fails once they exceed a fraction of the samples seen."""

    def __init__(self, limit: float) -> None:
        self.limit, self.seen, self.bad, self.last = limit, 0, 0, ""

    def add(self, where: str, error: object, samples: int = 1) -> None:
        """Count and log damage at ``where`` (a key or a shard). ValueError: more damage than the limit."""
        self.bad += samples
        self.last = f"{where}: {error}"
        if self.bad <= 10 or self.bad % 1000 == 0:
            _log.warning("skipped %s (%d so far)", self.last, self.bad)
        self.check(_GRACE)

    def check(self, at_least: int = 1) -> None:
        """ValueError: the damaged fraction of the samples seen (counted as ``at_least`` or more) exceeds the limit."""
        if self.bad > self.limit * max(self.seen, at_least):
            raise ValueError(
                f"{self.bad} of {self.seen} samples are damaged, above max_damaged={self.limit}; "
                f"last {self.last}; write the shards again, or raise max_damaged"
            )


def read_shard(shard: Shard, damage: Damage) -> Iterator[dict[str, Any]]:
    """Undecoded samples of one shard: ``__key__`` and the bytes of the wanted members.

    Errors of the tar file, and samples that the shard should hold but lacks, count as damage.
    """
    read = 0
    try:
        for sample in tarfile_samples(iter([{"url": shard.url}]), select_files=_wanted):
            read += 1
            damage.seen += 1
            yield sample
        if not _ends_properly(shard.url):
            raise tarfile.ReadError("truncated between two members")
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        damage.add(shard.url, error)
    if shard.samples is not None and read < shard.samples:
        damage.add(shard.url, f"holds {read} samples instead of {shard.samples}", shard.samples - read)


def _ends_properly(url: str) -> bool:
    # tarfile accepts the end of the file as the end of the archive; a complete archive ends with 1024 zero bytes.
    if ":" in url or not url.endswith(".tar"):
        return True
    with open(url, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
        return file.read() == bytes(1024)


def shuffled(samples: Iterator[Any], size: int, rng: Random) -> Iterator[Any]:
    """The samples in random order within a buffer of ``size``."""
    buffer: list[Any] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = rng.randrange(size)
        buffer[place], sample = sample, buffer[place]
        yield sample
    rng.shuffle(buffer)
    yield from buffer


def caption_id(caption: str) -> int:
    """A signed 64-bit hash: equal captions have equal ids on all ranks."""
    return int.from_bytes(blake2b(caption.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Decoder:
    """Bytes of one sample -> picture, token ids and label; formats: pictures, UTF-8 text, JSON.

    captions: False ignores texts, so that labelled pictures without a text are complete samples.
    classes: the number of classes, where every sample must have a label.
    """

    transform: Transform
    tokenizer: Tokenizer
    captions: bool = True
    classes: int | None = None

    def __call__(self, sample: dict[str, Any], rng: Random) -> dict[str, Any]:
        """{"image": uint8 [H,W,3], "key", "ids" and "caption_id" with captions, "label" where there is one}.

        ValueError, OSError: a member is missing, damaged or empty.
        """
        picture = next((sample[extension] for extension in PICTURES if extension in sample), None)
        if picture is None or (self.captions and "txt" not in sample):
            members = sorted(name for name in sample if not name.startswith("__"))
            raise ValueError(f"needs a picture{' and a txt' if self.captions else ''}, has {members}")
        out: dict[str, Any] = {"key": sample["__key__"]}
        if self.captions:
            caption = sample["txt"].decode("utf-8").strip()
            out["ids"] = self.tokenizer.ids(caption, truncate=True)  # refuses an empty caption
            out["caption_id"] = caption_id(caption)
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG", "WEBP")) as image:
            out["image"] = self.transform(image, rng)
        facts = json.loads(sample["json"]) if "json" in sample else {}
        label = sample["cls"] if "cls" in sample else facts.get("label") if isinstance(facts, dict) else None
        if self.classes is not None and not (label is not None and 0 <= int(label) < self.classes):
            raise ValueError(f"needs a label (cls, or json's label) below {self.classes}, has {label}")
        return out if label is None else {**out, "label": int(label)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor | list[str]]:
    """Decoded samples -> a batch; ``text`` is as wide as the longest caption, because a causal tower ignores padding.

    "image": normalised float [B,3,H,W], "key": list of B strings; "text": long [B,T] and "caption_id": long [B]
    where captions are read; "label": long [B] where every sample has one.
    """
    batch: dict[str, Tensor | list[str]] = {
        "image": to_batch([sample["image"] for sample in samples]),
        "key": [sample["key"] for sample in samples],
    }
    if "ids" in samples[0]:
        longest = max(len(sample["ids"]) for sample in samples)
        batch["text"] = torch.tensor([sample["ids"] + [0] * (longest - len(sample["ids"])) for sample in samples])
        batch["caption_id"] = torch.tensor([sample["caption_id"] for sample in samples])
    if all("label" in sample for sample in samples):
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


class ShardDataset(IterableDataset):
    """Batches of the shards that belong to this worker of this rank.

    Training (``batches`` given): each epoch permutes all shards by (seed, epoch) and pads them by wrap-around to a
    multiple of the readers. Every reader delivers exactly ``batches`` full batches, and starts its shards over where
    they hold too few samples. A batch is the next ``batch_size`` samples of the undecoded stream; a damaged sample is
    replaced by an intact one of the same batch. The number of a batch thus determines its contents, and a resumed
    epoch skips finished batches without decoding them.
    Evaluation (``batches`` None): every sample once, in order; the last batch may be smaller.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        decoder: Decoder,
        batch_size: int,
        *,
        batches: int | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_damaged: float = 0.01,
    ) -> None:
        self.shards, self.decoder, self.batch_size, self.batches = list(shards), decoder, batch_size, batches
        self.rank, self.world, self.seed = rank, world, seed
        self.shuffle_buffer, self.max_damaged = shuffle_buffer, max_damaged
        # Shared memory: workers that outlive an epoch see the next one's number, under fork and spawn alike.
        self._position = torch.zeros(2, dtype=torch.long).share_memory_()

    def set_position(self, epoch: int, done: int = 0) -> None:
        """Set the epoch of the next iteration, in this process and in all its workers.

        done: finished batches of that epoch, over all workers of this rank, which are skipped.
        """
        self._position.copy_(torch.tensor([epoch, done]))

    def reader_shards(self, epoch: int, worker: int, workers: int) -> list[Shard]:
        """The shards of one worker of this rank, in reading order."""
        shards = list(self.shards)
        if self.batches is not None:
            Random(f"{self.seed}/{epoch}").shuffle(shards)
            shards += shards[: -len(shards) % (self.world * workers)]
        return shards[self.rank :: self.world][worker::workers]

    def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, done = self._position.tolist()
        # 1. Resume: workers deliver in turn, the first one first, so it takes the share of the worker whose turn it is.
        worker = (worker + done) % workers
        number = (done - worker + workers - 1) // workers  # batches that this share had delivered
        damage = Damage(self.max_damaged)
        # 2. Read past the samples of the finished batches, undecoded.
        raw = self._raw(epoch, worker, workers, damage)
        deque(islice(raw, number * self.batch_size), maxlen=0)
        # 3. Decode one window of the stream per batch; training replaces damaged samples, evaluation drops them.
        while number != self.batches and (window := list(islice(raw, self.batch_size))):
            samples = [sample for entry in window if (sample := self._decode(entry, epoch, damage)) is not None]
            if self.batches is not None and len(samples) < len(window):
                if not samples:
                    raise ValueError(f"all {len(window)} samples of a batch are damaged, last {damage.last}")
                samples = [samples[place % len(samples)] for place in range(len(window))]
            if samples:
                yield collate(samples)
            number += 1
        # 4. Compare the damage of the whole pass with the limit.
        damage.check()

    def _decode(self, raw: dict[str, Any], epoch: int, damage: Damage) -> dict[str, Any] | None:
        try:
            return self.decoder(raw, Random(f"{self.seed}/{epoch}/{raw['__key__']}"))
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            damage.add(raw["__key__"], error)
            return None

    def _raw(self, epoch: int, worker: int, workers: int, damage: Damage) -> Iterator[dict[str, Any]]:
        shards = self.reader_shards(epoch, worker, workers)
        rng = Random(f"{self.seed}/{epoch}/{self.rank}/{worker}")
        while True:
            before = damage.seen
            stream = (sample for shard in shards for sample in read_shard(shard, damage))
            if self.batches is None:
                yield from stream
                return
            yield from shuffled(stream, self.shuffle_buffer, rng)
            damage.check()
            if damage.seen == before:
                raise ValueError(f"no sample in {len(shards)} shards, first {shards[0].url}")

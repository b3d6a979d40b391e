"""WebDataset shards -> batches, for one of several readers. A reader is one worker of one rank.

webdataset parses the tar files. This file assigns shards to readers, orders and decodes samples, and counts damage:
webdataset's own stages repeat one order every epoch, look for the rank inside the worker, and decode pickles.

Shapes: B samples, T tokens, H height, W width.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from hashlib import blake2b
from io import BytesIO
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from common.data.account import Account, Unusable
from common.data.augmentations import Rewrite
from common.data.images import SHARD_FORMATS, open_picture
from common.data.packing import read_manifest
from common.data.tar import PICTURES, Shard, count_headers, is_remote, read_shard
from common.data.transforms import Transform, to_batch
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer, is_empty

_ROWS = 256  # one row of counts for each worker of a loader


def expand(pattern: str, allow_pipe: bool = False) -> list[str]:
    """Paths and URLs of a pattern with ``{000..059}`` braces and ``${VARIABLES}``.

    ValueError: a variable is not set, a ``pipe:`` command was not allowed, or local files do not exist.
    """
    unset = [name for name in re.findall(r"\$\{?(\w+)\}?", pattern) if name not in os.environ]
    if unset and not pattern.startswith("pipe:"):
        raise ValueError(f"{pattern!r}: set the environment variable {unset[0]} to the folder of the shards")
    urls = list(braceexpand(os.path.expanduser(os.path.expandvars(pattern))))
    if not allow_pipe and any(url.startswith("pipe:") for url in urls):
        raise ValueError(f"{pattern!r} runs a shell command; set allow_pipe: true if you trust this configuration")
    missing = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
    if missing:
        raise ValueError(f"{_missing(missing, urls, pattern)}")
    return urls


def _missing(missing: Sequence[str], urls: Sequence[str], pattern: str) -> str:
    first = Path(missing[0]).absolute()
    if first.is_dir():
        return f"{pattern!r} is a folder; name its shards, as in {first}/{{00000..00099}}.tar"
    if any(sign in missing[0] for sign in "*?"):
        return (
            f"{pattern!r} is a glob (of {len(glob(missing[0]))} files); name the shards by their numbers, as in "
            "{00000..00099}.tar, so that a lost one is missed"
        )
    if "::" in missing[0]:
        return f"{pattern!r} joins shards by '::'; name them by braces, as in {{a,b}}.tar"
    return f"{len(missing)} of {len(urls)} shards of {pattern!r} are missing, first {first}"


def count_samples(urls: Sequence[str]) -> list[Shard]:
    """Each shard with its number of samples, from ``manifest.json`` beside it, or else from the tar headers.

    The number of a remote shard stays None.
    """
    shards = []
    known = manifests(urls)
    for url in urls:
        entry = entry_of(url, known)
        shards.append(Shard(url, entry["samples"] if entry else None if is_remote(url) else count_headers(url)))
    return shards


def entry_of(url: str, known: dict[Path, dict[str, Any]]) -> dict[str, Any] | None:
    """A shard's entry in the manifest beside it, None where there is none."""
    return known.get(Path(url).parent, {"shards": {}})["shards"].get(Path(url).name)


def manifests(urls: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """The manifest of every folder of local shards that has one."""
    folders = {Path(url).parent for url in urls if not is_remote(url)}
    return {folder: manifest for folder in sorted(folders) if (manifest := read_manifest(folder)) is not None}


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
    image_views: further ways to draw the picture.  text_view: a further way to write the caption.
    """

    transform: Transform
    preprocess: Preprocess
    tokenizer: Tokenizer
    captions: bool = True
    classes: int | None = None
    image_views: tuple[Transform, ...] = ()
    text_view: Rewrite | None = None

    def __call__(self, sample: dict[str, Any], rng: Random) -> dict[str, Any]:
        """{"image": uint8 [H,W,3], "key", "ids" and "caption_id" with captions, "label" where there is one}.

        With further views also "image_views", a list of uint8 [H,W,3], and "text_view", the ids of the new caption.
        Unusable: a member is missing, damaged or empty.
        """
        picture = next((sample[extension] for extension in PICTURES if extension in sample), None)
        if picture is None or (self.captions and "txt" not in sample):
            members = sorted(name for name in sample if not name.startswith("__"))
            mend = ""
            if any("." in name for name in members):
                mend = "; a member's name may have one dot, before its kind"
            elif "__link__" in sample:
                mend = f"; {sample['__link__']} is a link, pack with tar --hard-dereference"
            elif picture is not None and "cls" in sample:
                mend = "; captions: false reads pictures with labels alone"
            raise Unusable(
                "no picture" if picture is None else "no caption",
                f"needs a picture{' and a txt' if self.captions else ''}, has {members}{mend}",
            )
        out: dict[str, Any] = {"key": sample["__key__"]}
        if self.captions:
            try:
                caption = sample["txt"].decode("utf-8-sig").strip()
                out["ids"] = self.tokenizer.ids(caption, truncate=True)  # refuses an empty caption
            except ValueError as error:
                raise Unusable("unusable caption", error) from error
            out["caption_id"] = caption_id(caption)
        image = open_picture(BytesIO(picture), SHARD_FORMATS)
        out["image"] = self.transform(image, rng)
        if self.image_views:
            out["image_views"] = [view(image, rng) for view in self.image_views]
        if self.captions and self.text_view is not None:
            view = self.text_view(caption, rng)
            # A part of a caption may hold nothing but signs that no reader sees.
            out["text_view"] = self.tokenizer.ids(caption if is_empty(view) else view, truncate=True)
        label = self._label(sample)
        return out if label is None else {**out, "label": label}

    def _label(self, sample: dict[str, Any]) -> int | None:
        """The label in cls or json; None where there is none, or with captions where it is no whole number."""
        if "cls" in sample:
            value: Any = sample["cls"].decode("utf-8", "replace").strip()
        else:
            try:
                facts = json.loads(sample.get("json", b"{}"))
            except ValueError as error:
                raise Unusable("unusable label", f"its json cannot be read: {error}") from error
            value = facts.get("label") if isinstance(facts, dict) else None
        whole = type(value) is int or (isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()) is not None)
        label = int(value) if whole and abs(int(value)) < 2**63 else None
        if self.classes is not None and (label is None or not 0 <= label < self.classes):
            raise Unusable("unusable label", f"needs a label (cls, or json's label) below {self.classes}, has {value}")
        if label is None and value is not None and not self.captions:
            raise Unusable("unusable label", f"needs a whole number as label (cls, or json's label), has {value!r}")
        return label


def collate(samples: Sequence[dict[str, Any]], preprocess: Preprocess) -> dict[str, Any]:
    """Decoded samples -> a batch; ``text`` is as wide as the longest caption, because a causal tower ignores padding.

    "image": normalised float [B,3,H,W], "key": list of B strings; "text": long [B,T] and "caption_id": long [B]
    where captions are read; "label": long [B] where every sample has one. With further views: "image_views", a list of
    float [B,3,H,W], and "text_view", long [B,T'].
    """
    batch: dict[str, Any] = {
        "image": to_batch([sample["image"] for sample in samples], preprocess),
        "key": [sample["key"] for sample in samples],
    }
    if "ids" in samples[0]:
        batch["text"] = _padded([sample["ids"] for sample in samples])
        batch["caption_id"] = torch.tensor([sample["caption_id"] for sample in samples])
    if "image_views" in samples[0]:
        views = zip(*(sample["image_views"] for sample in samples), strict=True)
        batch["image_views"] = [to_batch(pictures, preprocess) for pictures in views]
    if "text_view" in samples[0]:
        batch["text_view"] = _padded([sample["text_view"] for sample in samples])
    if all("label" in sample for sample in samples):
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def _padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows of ids -> long [B,T], as wide as the longest, zero after each."""
    longest = max(map(len, rows))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows])


class ShardDataset(IterableDataset):
    """Batches of the shards that belong to this worker of this rank.

    Training (``batches`` given): each epoch permutes all shards by (seed, epoch) and pads them by wrap-around to a
    multiple of the readers. Every reader delivers exactly ``batches`` full batches, and starts its shards over where
    they hold too few samples. A batch is the next ``batch_size`` samples of the undecoded stream; a damaged sample is
    replaced by an intact one of the same batch. The number of a batch thus determines its contents, and a resumed
    epoch skips finished batches without decoding them.
    Evaluation (``batches`` None): every sample once, in order; the last batch may be smaller. Where there are fewer
    shards than readers, each reader takes every n-th sample of all of them.

    account(): what became of the samples so far, over all workers of this rank.
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
        self._counts = torch.zeros(_ROWS, len(Account().counts()), dtype=torch.long).share_memory_()

    def account(self) -> Account:
        """The account of all that the workers of this rank delivered and rejected so far."""
        return Account.from_counts(self._counts.sum(0).tolist())

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
        elif self._strided(workers):
            return shards
        return shards[self.rank :: self.world][worker::workers]

    def _strided(self, workers: int) -> bool:
        return self.batches is None and len(self.shards) < self.world * workers

    def reader_samples(self, worker: int, workers: int) -> int:
        """How many samples one worker of this rank evaluates, where the number in every shard is known."""
        samples = sum(shard.samples for shard in self.reader_shards(0, worker, workers))
        if not self._strided(workers):
            return samples
        return len(range(self.rank + self.world * worker, samples, self.world * workers))

    def evaluation_batches(self, workers: int) -> int | None:
        """Batches of an evaluation by so many workers of this rank; None where a shard's samples are not known."""
        if any(shard.samples is None for shard in self.shards):
            return None
        return sum(-(-self.reader_samples(worker, workers) // self.batch_size) for worker in range(workers))

    def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, done = self._position.tolist()
        # 1. Resume: workers deliver in turn, the first one first, so it takes the share of the worker whose turn it is.
        worker = (worker + done) % workers
        number = (done - worker + workers - 1) // workers  # batches that this share had delivered
        counts = self._counts[info.id % _ROWS if info else 0]
        account, before = Account(self.max_damaged), counts.clone()
        # 2. Read past the samples of the finished batches, undecoded.
        raw = self._raw(epoch, worker, workers, account)
        deque(islice(raw, number * self.batch_size), maxlen=0)
        # 3. Decode one window of the stream per batch; training replaces damaged samples, evaluation drops them.
        while number != self.batches and (window := list(islice(raw, self.batch_size))):
            samples = [sample for entry in window if (sample := self._decode(entry, epoch, account)) is not None]
            counts.copy_(before + torch.tensor(account.counts()))
            if self.batches is not None and len(samples) < len(window):
                if not samples:
                    raise ValueError(f"all {len(window)} samples of a batch are damaged, last {account.last}")
                samples = [samples[place % len(samples)] for place in range(len(window))]
            if samples:
                yield collate(samples, self.decoder.preprocess)
            number += 1
        # 4. Compare the damage of the whole pass with the limit.
        counts.copy_(before + torch.tensor(account.counts()))
        account.check()

    def _decode(self, raw: dict[str, Any], epoch: int, account: Account) -> dict[str, Any] | None:
        try:
            sample = self.decoder(raw, Random(f"{self.seed}/{epoch}/{raw['__key__']}"))
        except Unusable as error:
            account.reject(raw["__key__"], error)
            return None
        account.delivered += 1
        return sample

    def _raw(self, epoch: int, worker: int, workers: int, account: Account) -> Iterator[dict[str, Any]]:
        shards = self.reader_shards(epoch, worker, workers)
        rng = Random(f"{self.seed}/{epoch}/{self.rank}/{worker}")
        while True:
            before = account.seen
            if self._strided(workers):
                yield from _every(shards, self.rank + self.world * worker, self.world * workers, account)
                return
            stream = (sample for shard in shards for sample in read_shard(shard, account))
            if self.batches is None:
                yield from stream
                return
            yield from shuffled(stream, self.shuffle_buffer, rng)
            account.check()
            if account.seen == before:
                raise ValueError(f"no sample in {len(shards)} shards, first {shards[0].url}")


def _every(shards: Sequence[Shard], first: int, step: int, account: Account) -> Iterator[dict[str, Any]]:
    """Every ``step``-th undecoded sample of shards that several readers share, from the ``first`` on.

    All of them read all shards. What is wrong with these, the reader from 0 on counts alone.
    """
    found = Account()
    for place, sample in enumerate(sample for shard in shards for sample in read_shard(shard, found)):
        if place % step == first:
            account.seen += 1
            yield sample
    if first == 0:
        account.add(replace(found, seen=found.bad))

"""The samples of one shard: tar members grouped by key, from a file, a URL or a command.

A key is a member's path up to the first dot of its name, as in webdataset; a sample is a run of adjacent members with
one key. tarfile alone would take a damaged or cut archive for a finished one; here every archive must be closed.
"""

from __future__ import annotations

import logging
import re
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import base_plus_ext

from common.data.account import Account, Unusable
from common.data.files import is_system_file

_log = logging.getLogger(__name__)
PICTURES = ("jpg", "jpeg", "png", "webp")
WANTED = (*PICTURES, "txt", "json", "cls")
LINK = "link in a tar"
_TRIES, _PAUSE = 3, 1.0  # attempts to read a remote shard, seconds between them
_CURL_COMMAND = ("curl", "--connect-timeout", "30", "--fail", "--silent", "--location")
_CURL = {6: "unknown host", 7: "no connection", 18: "the transfer ended early", 22: "the server has no such file"}


class Shard(NamedTuple):
    """A shard's path or URL and its number of samples (None: unknown). estimate: where the number is unknown."""

    url: str
    samples: int | None
    estimate: int | None = None


class Ignored(NamedTuple):
    """A member that is no part of a sample, with the reason."""

    reason: str
    name: str


def is_remote(url: str) -> bool:
    """Whether a shard is a URL (``word://...``) or a command (``pipe:...``); a path may have colons in it."""
    return re.match(r"[A-Za-z][\w+.-]*://|pipe:", url) is not None


def open_url(url: str) -> BinaryIO:
    """The bytes of a path, a URL or a command."""
    if url.startswith(("http://", "https://")):  # webdataset's own command would try for a minute
        return Pipe([*_CURL_COMMAND, url], mode="rb", bufsize=8192, ignore_status=[141, 23])  # closed by us
    return gopen(url, "rb") if is_remote(url) else open(url, "rb")


class _Header(tarfile.TarInfo):
    """A tar header that does not take damage for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # a block of zeros
            tar.is_closed = True
            raise
        except tarfile.EmptyHeaderError as error:
            if not getattr(tar, "is_closed", False):
                raise tarfile.ReadError("truncated: the archive's end is missing") from error
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged at byte {tar.offset} ({error})") from error
        tar.is_closed = False
        return header


def samples(stream: Any, contents: bool = True) -> Iterator[dict[str, Any] | Unusable | Ignored]:
    """Undecoded samples of a tar stream, and what is wrong with it, in the order of its members.

    A sample is {"__key__": key, extension: bytes}, with the wanted members alone; "__link__" names one that is a link.
    Archives that were joined to one file are read one after the other.
    contents: False reads headers alone; members are then empty.
    tarfile.ReadError and the decompressors' errors: the archive is damaged or not closed.
    """
    seen: set[str] = set()
    sample: dict[str, Any] = {}
    mode = "r|*" if contents else "r:*"
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header, ignore_zeros=True) as tar:
        for member in tar:
            tar.members = []  # tarfile would keep the headers of all
            if member.isdir():
                continue
            key, extension = base_plus_ext(member.name)
            reason = _not_read(member, extension)
            if reason:
                if reason == LINK and sample and key == sample["__key__"]:
                    sample["__link__"] = member.name
                yield Ignored(reason, member.name)
                continue
            extension = extension.lower()
            if sample and key != sample["__key__"]:
                yield _finished(sample, seen)
                sample = {}
            sample.setdefault("__key__", key)
            if extension in sample:
                sample["__twice__"] = member.name
            sample[extension] = tar.extractfile(member).read() if contents else b""
    if sample:
        yield _finished(sample, seen)


def _not_read(member: tarfile.TarInfo, extension: str | None) -> str:
    """Why a member is no part of a sample, empty where it is one."""
    if is_system_file(member.name):
        return "system file"
    if extension is None or extension.rsplit(".", 1)[-1].lower() not in WANTED:
        return "kind that is not read"
    return "" if member.isreg() else LINK


def _finished(sample: dict[str, Any], seen: set[str]) -> dict[str, Any] | Unusable:
    key = sample["__key__"]
    if "__twice__" in sample:
        return Unusable("repeated key", f"{key}: the member {sample['__twice__']} comes twice; pack the shard again")
    if key in seen:
        return Unusable(
            "repeated key",
            f"{key}: its key came before in this shard; give every sample its own key and keep its members together "
            "(tar --sort=name)",
        )
    seen.add(key)
    return sample


def read_shard(shard: Shard, account: Account) -> Iterator[dict[str, Any]]:
    """Undecoded samples of one shard; the account counts what is wrong with it.

    Damage of a local shard counts as rejected samples: all that it should hold but lacks. A remote shard whose
    connection fails is opened again, and continues after its last sample.
    ValueError: a remote shard that fails three times, or more damage than the account allows.
    """
    read = 0
    for item in _items(shard):
        if isinstance(item, Ignored):
            account.ignore(item.reason, f"{shard.url}:{item.name}")
        elif isinstance(item, Unusable) and item.reason == "damaged shard":
            wanted = shard.samples or shard.estimate or 0
            holds = f"; holds {read} samples instead of {'about ' * (not shard.samples)}{wanted}" if wanted else ""
            account.seen += (missing := max(1, wanted - read))
            account.reject(shard.url, Unusable(item.reason, f"{item}{holds}"), missing)
            return
        else:
            read += 1
            account.seen += 1
            if isinstance(item, Unusable):
                account.reject(shard.url, item)
            else:
                yield item
    if shard.samples is not None and read < shard.samples:
        holds = f"holds {read} samples instead of {shard.samples}"
        account.seen += shard.samples - read
        account.reject(shard.url, Unusable("missing from its shard", holds), shard.samples - read)


def _items(shard: Shard) -> Iterator[dict[str, Any] | Unusable | Ignored]:
    """The items of ``samples``; damage of a local shard is the last one. ValueError: a remote shard cannot be read."""
    done = tries = 0
    while True:
        try:
            with closing(open_url(shard.url)) as stream:
                for item in islice(samples(stream), done, None):
                    done, tries = done + 1, 0
                    yield item
            return
        except Exception as error:  # tarfile and the decompressors raise many kinds of errors on damaged bytes
            tries += 1
            if not is_remote(shard.url):
                yield Unusable("damaged shard", error)
                return
            if tries >= _TRIES:
                raise ValueError(
                    f"{shard.url} cannot be read ({_reason(error)}), tried {_TRIES} times; check the address and the "
                    "connection"
                ) from error
        time.sleep(_PAUSE)


def _reason(error: Exception) -> str:
    """The words of an error; of curl's, what its exit status means."""
    status = re.search(r"'curl'.*exit (\d+)", str(error))
    if status is None:
        return str(error)
    return f"curl: {_CURL.get(int(status[1]), f'exit status {status[1]}')}"


def count_headers(path: str) -> int:
    """The number of samples in a local shard by its headers alone; those before the damage in a damaged one."""
    count = 0
    try:
        with open(path, "rb") as stream:
            for item in samples(stream, contents=False):
                count += not isinstance(item, Ignored)
    except Exception as error:  # the reader will count the damage
        _log.warning("%s: %s", path, error)
    return count

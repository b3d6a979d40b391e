"""A user's picture files: search of folders, and decoding ahead by threads, which reports damaged files.

Shapes: H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.data.account import Account, Unusable
from common.data.ahead import read_in_order
from common.data.images import open_picture
from common.data.prepared import SPECIAL, SUFFIXES, is_special, is_system_file, kind_of

if TYPE_CHECKING:
    from common.data.transforms import Transform


@dataclass(frozen=True)
class Picture:
    """name: path or number.  pixels: uint8 [H,W,3], or a list of such where the transform gives one for each model; or
    None with the reason in ``error``.
    """

    name: str
    pixels: np.ndarray | list[np.ndarray] | None
    error: str | None = None


def files_below(folder: Path, account: Account | None = None) -> Iterator[Path]:
    """Every file in a folder, at any depth: the files directly in a folder first, in the order of their names.

    Links to folders are followed. System files are left out, pipes and devices, and a folder that was reached before
    (by a link).
    account: counts what is left out.
    ValueError: an unreadable folder, which ``os.walk`` and ``Path.rglob`` would silently skip, or a link to a folder
        above it.
    """
    account = Account() if account is None else account
    yield from _walk(folder, folder, [], set(), account)


def _walk(root: Path, folder: Path, above: list[tuple], seen: set[tuple], account: Account) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror}); make it readable") from error
    place = (status.st_dev, status.st_ino)
    if place in above:
        raise ValueError(f"{folder} is a link to a folder above it, so its pictures have no end; remove the link")
    if place in seen:
        account.ignore("folder seen before", folder)
        return
    seen.add(place)
    folders = []
    for entry in entries:
        path = Path(folder, entry.name)
        if is_system_file(entry.name):
            account.ignore("system file", path.relative_to(root))
        elif entry.is_dir():
            folders.append(path)
        elif is_special(path, entry.is_file()):
            account.ignore("kind that is not read", path.relative_to(root), SPECIAL)
        else:
            yield path
    for inner in folders:
        yield from _walk(root, inner, [*above, place], seen, account)


def pictures_below(folder: Path, account: Account) -> Iterator[Path]:
    """The picture files of ``files_below``, by their suffix; the account counts the other files."""
    for file in files_below(folder, account):
        if file.name.lower().endswith(SUFFIXES):
            yield file
        else:
            account.ignore("kind that is not read", file.relative_to(folder), kind_of(file))


def find_pictures(paths: Sequence[str | Path], account: Account | None = None) -> Iterator[Path]:
    """The picture files among ``paths`` and, by suffix, in the folders among them, at any depth, sorted.

    A file in ``paths`` is taken whatever its suffix. Folders are searched as by ``files_below``.
    account: counts the files that are left out.
    ValueError: a missing path, a folder without a picture, or an unreadable folder at any depth.
    """
    account = Account() if account is None else account
    for path in map(Path, paths):
        if path.is_file():
            yield path
            continue
        if not path.is_dir():
            raise ValueError(f"no picture and no folder at {path.absolute()}")
        empty = True
        for file in pictures_below(path, account):
            empty = False
            yield file
        if empty:
            raise ValueError(f"{path.absolute()} holds no picture ({', '.join(SUFFIXES)}){account.ignored_files()}")


def decode(name: str, source: Path | Image.Image, transform: Transform) -> Picture:
    """One picture, opened by ``open_picture`` and transformed."""
    try:
        return Picture(name, transform(open_picture(source), Random(0)))
    except Exception as error:  # of the picture, or of a caller's transform
        return Picture(name, None, str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}")


def read_ahead(
    sources: Iterable[Path | Image.Image], transform: Transform, workers: int, ahead: int
) -> Iterator[Picture]:
    """The pictures in order, decoded by ``workers`` threads; at most ``ahead`` of them wait in memory."""
    return read_in_order(partial(decode, transform=transform), sources, workers, ahead)

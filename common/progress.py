"""Progress bars of the commands, on the error stream: what they print is for a file or for the next program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar that goes on as they are taken. total: how many, where ``items`` has no length."""
    return track(items, what, total, console=Console(stderr=True))

"""Progress bars of the commands. They go to the error stream, so that the output can be piped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """Iterate over ``items`` behind a progress bar. total: the number of items, where ``items`` has no length."""
    return track(items, what, total, console=Console(stderr=True))

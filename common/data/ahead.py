"""Pictures read ahead by threads, in order. It needs no torch: exported folders read this way too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_Source = TypeVar("_Source")
_Result = TypeVar("_Result")


def read_in_order(
    read: Callable[[str, _Source], _Result], sources: Iterable[_Source], workers: int, ahead: int
) -> Iterator[_Result]:
    """``read(name, source)`` of each source, in order, by ``workers`` threads; at most ``ahead`` results wait.

    The name is a path as it stands, a PIL image's file, or the source's number.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[_Result]] = deque()
    try:
        for number, source in enumerate(sources):
            path = source if isinstance(source, str | Path) else getattr(source, "filename", "")
            waiting.append(pool.submit(read, str(path or number), source))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

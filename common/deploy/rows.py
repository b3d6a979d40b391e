"""Rows of answers as CSV or JSON lines, on the screen or in a file, each written as soon as it is known.

Nothing here imports torch: exported folders carry this module too.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from common.paths import written_whole

Row = dict[str, Any]
"""One picture's row by column; "picture" is its name."""


@contextmanager
def row_writer(out: Path | None, jsonl: bool) -> Iterator[Callable[[Row], None]]:
    """A function that writes one row; the first row names the columns.

    out: the file, which appears when all rows are written, and in which a name that is not valid Unicode keeps its
    bytes; None: the screen, which shows escaped, as \\udcff, what its encoding lacks.
    """
    if out is None:
        if isinstance(sys.stdout, TextIOWrapper):  # a notebook's has no encoding to fail
            sys.stdout.reconfigure(errors="backslashreplace")
        yield _writer(sys.stdout, jsonl)
        sys.stdout.flush()
        return
    with written_whole(out) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield _writer(file, jsonl)


def _writer(file: IO[str], jsonl: bool) -> Callable[[Row], None]:
    if jsonl:
        return lambda row: print(json.dumps(row), file=file)
    table: csv.DictWriter | None = None

    def write(row: Row) -> None:
        nonlocal table
        if table is None:
            table = csv.DictWriter(file, list(row), lineterminator="\n")
            table.writeheader()
        table.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})

    return write

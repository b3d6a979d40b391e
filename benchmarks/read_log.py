"""The log of every evaluation on `test`: benchmarks/results/test-reads.jsonl, a line each.

A number that was looked at before a choice is no test of that choice, so tables print how often their models were read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from common.conditions import conditions, digest

LOG = RESULTS / "test-reads.jsonl"


def record(table: str, data: str, weights: Iterable[Path], log: Path | None = None) -> None:
    """Log that a table now reads the test split of a data set with the models in these weights files.

    log: the file, where it is not LOG.
    """
    log = log or LOG
    run = conditions("embedded")
    read = {"table": table, "data": data, "models": digests(list(weights))}
    line = {"date": run["date"], "revision": run["revision"], **read}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def digests(weights: Sequence[Path]) -> dict[str, str]:
    """Each weights file's digest by its name; files of one name, in folders of runs, have their folder's name too."""
    count = Counter(path.name for path in weights)
    return {path.name if count[path.name] == 1 else f"{path.parent.name}/{path.name}": digest(path) for path in weights}


def reads(weights: Path, data: str, log: Path | None = None) -> int:
    """How often the model in a weights file was evaluated on the test split of a data set. log: see ``record``."""
    known = digest(weights)
    return sum(line["data"] == data and known in line["models"].values() for line in _lines(log or LOG))


def reads_of_all(data: str) -> int:
    """How often the test split of a data set was read, with whatever models."""
    return sum(line["data"] == data for line in _lines(LOG))


def remark(run: Mapping[str, Any]) -> str:
    """What the note below a table adds: how often its test pictures had been read; empty where it is not stored.

    run: conditions with ``reads_of_test``, a number, or one for each data set by name.
    """
    count = run.get("reads_of_test")
    if isinstance(count, Mapping):
        count = ", ".join(f"{name} {number}" for name, number in count.items())
    return f" Reads of these test pictures by then, with whatever models: {count}." if count else ""


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, log.read_text().splitlines() if log.is_file() else ())

"""The README's tables and the report page, written from the result files: no number in them is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is a benchmark's, or "retrain".
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.__main__ import BENCHMARKS, RESULTS, module_of
from benchmarks.page import build
from common.paths import runs_directory

README = Path(__file__).parent.parent / "README.md"
_TABLE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- /table -->)", re.S)


def table(name: str) -> str:
    """The Markdown of a benchmark's stored result, or that it was not run. ValueError: no such benchmark."""
    if name == "retrain":
        return module_of(name).table()
    if name not in BENCHMARKS:
        raise ValueError(f"the README asks for table {name!r}; there are {[*BENCHMARKS, 'retrain']}")
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"Not run: `python -m benchmarks {name}`.\n"
    return module_of(name).render(json.loads(path.read_text()))["md"]


def fill(text: str, tables: Callable[[str], str] = table) -> str:
    """``text`` with everything between the marks replaced by the tables they name."""
    return _TABLE.sub(lambda mark: f"{mark[1]}\n{tables(mark[2]).strip()}\n\n{mark[3]}", text)


def main(arguments: Sequence[str] = ()) -> int:
    """Write the README's tables, the Markdown beside each result, and the page, anew."""
    command = argparse.ArgumentParser(prog="python -m benchmarks report", description=main.__doc__)
    page = runs_directory() / "report.html"
    command.add_argument("--page", type=Path, default=page, help="the HTML file (default %(default)s)")
    said = command.parse_args(arguments)
    for name in BENCHMARKS:
        if (RESULTS / f"{name}.json").is_file():
            (RESULTS / f"{name}.md").write_text(table(name))
    text = README.read_text()
    README.write_text(fill(text))
    print(f"{len(_TABLE.findall(text))} tables written to {README.name}")
    said.page.parent.mkdir(parents=True, exist_ok=True)
    said.page.write_text(build(RESULTS))
    print(f"{said.page}: {said.page.stat().st_size / 1e6:.1f} MB, for any browser, without a network")
    return 0

"""Writes the tables of README and docs, and the report page, from the result files.

A table is placed between ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is a result's, that of a benchmark with
a result for each device, or one of OTHERS.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.registry import benchmark_of, results
from benchmarks.report import headlines, reducers, sweeps, waveclip_claims
from benchmarks.report.page import build
from benchmarks.together import deploy, frontier_tables
from benchmarks.training import retrain
from benchmarks.waveclip import table2_embedded
from common.paths import runs_directory

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS: dict[str, Callable[[], str]] = {
    "deploy-commands": lambda: _newest("deploy", deploy.commands),
    "deploy-costs": lambda: _newest("deploy", deploy.costs) + _elsewhere("deploy", deploy.goals),
    "deploy-python": lambda: _newest("deploy", deploy.in_python),
    "frontier-reducers": lambda: _newest("frontier", frontier_tables.reducers_on_test),
    "frontier-summary": lambda: _newest("frontier", frontier_tables.summary),
    "headlines": headlines.table,
    "reducer-picks": sweeps.picks,
    "reducers": reducers.overview,
    "reducers-at-equal-cost": sweeps.at_equal_cost,
    "reducers-in-tiles": reducers.in_tiles,
    "reducers-one-by-one": reducers.descriptions,
    "retrain": retrain.table,
    "waveclip-claims": waveclip_claims.verdicts,
    "table2-embedded": lambda: _newest("table2", lambda result: table2_embedded.markdown(result["embedded"])),
}
"""Tables that are not the whole Markdown of a benchmark."""
_LINK = "../benchmarks/results/{}.md"
"""From a page of docs to a result's Markdown."""
_TABLE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- /table -->)", re.S)


def table(name: str) -> str:
    """The Markdown of a stored result, of all devices' or of one's, or a line that it was not run; or one of OTHERS.

    ValueError: no such table.
    """
    if name in OTHERS:
        return OTHERS[name]()
    render = benchmark_of(name).load().render
    return "\n".join(render(result)["md"] for result in results(name, RESULTS)) or _not_run(name)


def _newest(name: str, markdown: Callable[[dict[str, Any]], str]) -> str:
    return next(map(markdown, results(name, RESULTS)), _not_run(name))


def _not_run(name: str) -> str:
    return f"Not run: `python -m benchmarks {benchmark_of(name).name}`.\n"


def _elsewhere(name: str, markdown: Callable[[dict[str, Any]], str]) -> str:
    """What is to say of every device but the newest, with a link to its tables."""
    entry = benchmark_of(name)
    return "".join(
        f"\nEarlier, on {result['conditions']['device']}: [all tables]({_LINK.format(entry.stem(result))})"
        f"\n\n{markdown(result)}"
        for result in results(name, RESULTS)[1:]
    )


def fill(text: str, tables: Callable[[str], str] = table) -> str:
    """``text`` with the current tables between their marks."""
    return _TABLE.sub(lambda mark: f"{mark[1]}\n{tables(mark[2]).strip()}\n\n{mark[3]}", text)


def main(arguments: Sequence[str] = ()) -> int:
    """Write the tables of README and docs, the Markdown beside each result, and the report page."""
    command = argparse.ArgumentParser(prog="python -m benchmarks report", description=main.__doc__)
    default = runs_directory() / "report.html"
    command.add_argument("--page", type=Path, default=default, help="the HTML file (default %(default)s)")
    args = command.parse_args(arguments)
    for path in RESULTS.glob("*.json"):
        path.with_suffix(".md").write_text(table(path.stem))
    for page in PAGES:
        text = page.read_text()
        page.write_text(fill(text))
        print(f"{page.relative_to(ROOT)}: {len(_TABLE.findall(text))} tables written")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(build(RESULTS))
    print(f"{args.page}: {args.page.stat().st_size / 1e6:.1f} MB, for any browser, without a network")
    return 0

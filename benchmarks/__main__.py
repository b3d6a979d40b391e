"""`python -m benchmarks NAME` makes a table or figure and writes its result to benchmarks/results.

``benchmarks.registry`` lists all names.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import RESULTS, figures
from benchmarks.registry import ACTIONS, BENCHMARKS, Benchmark, action, listing
from common.paths import runs_directory


def smoke() -> bool:
    """Whether SMOKE is set, for benchmarks at their smallest."""
    return os.environ.get("SMOKE", "0") not in ("", "0")


def write(entry: Benchmark, result: dict[str, Any], rendered: dict[str, Any], folder: Path) -> list[Path]:
    """Write a JSON and a Markdown of the result, and a PNG and SVG of each figure into ``folder``; returns their paths.

    ValueError: a number is infinite or NaN, which JSON does not have.
    """
    try:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"the result of {result['name']} holds a number that JSON does not have, an infinity or NaN; let it be "
            "null where it is computed"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{entry.stem(result)}.{ending}" for ending in ("json", "md")]
    paths[0].write_text(text + "\n")
    paths[1].write_text(rendered["md"])
    return paths + figures.save(rendered["figures"], folder)


def run_one(entry: Benchmark, console: Console) -> None:
    """Run one benchmark, print its table and write its files; train the embedded runs that it lacks first.

    A smoke run trains nothing. Its numbers mean nothing, so they go to the run directory and not to the results.
    """
    console.rule(entry.name)
    start = time.monotonic()
    maker = entry.load()
    result = maker.run(smoke=smoke())
    if result is None:
        console.print(f"{entry.name}: ONLY trains and evaluates nothing; the same line without it makes the table")
        return
    if entry.trains and not smoke() and entry.missing(result):
        name, *args = shlex.split(entry.trains)
        action(name).main(args)
        result = maker.run(smoke=False)
    rendered = figures.render(maker, result)
    place = getattr(maker, "folder", lambda: RESULTS)
    paths = write(entry, result, rendered, runs_directory() / "smoke" if smoke() else place())
    console.print(Markdown(rendered["md"]))
    written = ", ".join(os.path.relpath(path) for path in paths)
    console.print(f"[dim]{time.monotonic() - start:.0f} s; wrote {written}[/dim]", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when everything was done, 1 when a benchmark could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        add_help=False,  # behind an action's name it is the action's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"The papers' tables and figures, each beside ours.\n\n{listing()}",
        epilog="environment: SMOKE=1 (smallest runs, written to the run directory), IMAGENET and WEIGHTS "
        "(table2's accuracies at paper scale), ONLY (retrain, photos and fashion-mnist), CONFIG (retrain), "
        "EFFCLIP_DATA and DOWNLOAD=1 (fashion-mnist), DENSE, WAVECLIP, FIRST, DATA, EVERY and TIMES (deploy), "
        "PHOTOS, OUT, ARCHITECTURE and CREDIT (photos), SEEDS (photos and fashion-mnist), CLIP, MLIP, DATA, CAPTIONS "
        "and OUT (MLIP's figures), EFFCLIP_RUNS (run directory)",
    )
    benchmarks = {entry.name: entry for entry in BENCHMARKS}
    actions = {entry.name: entry for entry in ACTIONS}
    parser.add_argument("name", nargs="?", choices=[*benchmarks, *actions, "all"], metavar="NAME")
    parser.add_argument("-h", "--help", action="store_true", help="this text, or that of an action behind its name")
    args, rest = parser.parse_known_args(argv)
    if args.help and args.name not in actions:
        parser.print_help()
        return 0
    if args.name is None:
        print(listing())
        return 0
    if rest and args.name not in actions:
        parser.error(f"{args.name} takes no {' '.join(rest)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.name in actions:
        given = [*rest, "--help"] if args.help else rest
        return _reported(lambda: actions[args.name].main(given), args.name, console)
    chosen = list(BENCHMARKS) if args.name == "all" else [benchmarks[args.name]]
    if args.name == "all" and not smoke():
        for entry in (entry for entry in BENCHMARKS if entry.needs and not os.environ.get(entry.needs)):
            chosen.remove(entry)
            console.print(f"{entry.name}: not run, {entry.needs} is not set")
    return max(_reported(lambda entry=entry: run_one(entry, console), entry.name, console) for entry in chosen)


def _reported(call: Callable[[], int | None], name: str, console: Console) -> int:
    """Call and return the exit code; a ValueError becomes one line, so that with `all` the other benchmarks run."""
    try:
        return call() or 0
    except ValueError as error:
        if os.environ.get("EFFCLIP_DEBUG"):
            raise
        console.print(f"benchmarks: error: {name}: {error}", style="red", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())

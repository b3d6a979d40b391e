"""`effclip classify`: which of some labels fits each picture, at a chosen cost.

Each picture gives one row, as soon as it is classified: csv on the screen, or a .csv or .jsonl file. All other messages
go to the error stream. A mistake in the command line is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.arguments import add_model, model_arguments, read_labels, read_templates
from common.paths import written_whole

if TYPE_CHECKING:
    from common.deploy.model import Answer, Classification

_SUFFIXES = (".csv", ".jsonl")
_SIGPIPE_EXIT_CODE = 128 + 13
"""The exit code that a shell gives for SIGPIPE."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip classify", description=__doc__.splitlines()[0])
    add = command.add_argument
    add("paths", nargs="+", metavar="PATH", help="pictures, and folders of pictures at any depth")
    add("--labels", help='the classes, as "cat,dog"; default: those that the model was trained on')
    add("--labels-file", help="the classes in a text file, one a line")
    add(
        "--template",
        help="a prompt with {} for the label and {a} for its article, or a .txt file of such; default: the model's own",
    )
    add_model(command, default="the packaged model")
    add("--gmacs", type=float, help="mean budget for a picture, 10^9 multiply-adds; needs `effclip calibrate` once")
    add("--threshold", type=float, help="stop at the first level whose margin is at least this, in [0, 1]")
    add("--out", type=Path, help="a .csv or .jsonl file for the rows (default: csv to the screen)")
    add("--strict", action="store_true", help="exit with code 1 when a picture could not be read")
    add("--batch-size", type=int, default=64, help="pictures at a time (default %(default)s)")
    add("--workers", type=int, help="threads that read pictures (default: one a core, at most 8)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ValueError: a mistake in the command line or its files.

    0: done.  1: with --strict, a picture was damaged.  141: the reader of the rows has closed the pipe.
    """
    args = parser().parse_args(arguments)
    labels = read_labels(args.labels, args.labels_file)
    templates = None if args.template is None else read_templates(args.template)
    if args.out is not None and args.out.suffix not in _SUFFIXES:
        raise ValueError(f"--out {args.out}: rows are written as {' or '.join(_SUFFIXES)}")
    from common.data.files import find_pictures
    from common.deploy.model import load
    from common.packaged import default_model
    from common.progress import bar

    total = sum(1 for _ in find_pictures(args.paths))  # a missing path is an error before a model is loaded
    deployed = load(**model_arguments(args), device=args.device)
    if args.model is None:
        _say(default_model().about)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        classification = deployed.prepare(labels, gmacs=args.gmacs, threshold=args.threshold, templates=templates)
    for remark in remarks:
        _say(f"note: {remark.message}")
    tally, start = Tally(), time.monotonic()
    answers = classification.stream(find_pictures(args.paths), args.batch_size, args.workers)
    try:
        with _writer(args.out) as write:
            for answer in bar(answers, "classifying", total):
                tally.add(answer)
                write(asdict(answer))
    except BrokenPipeError:
        # The reader of the rows, such as head, has stopped. Rows in the buffer are flushed at exit and need a target.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_EXIT_CODE
    _say("\n".join(tally.lines(classification, time.monotonic() - start)))
    return 1 if args.strict and tally.damaged else 0


@dataclass
class Tally:
    """Counts over the answers so far, for the summary."""

    answered: int = 0
    damaged: int = 0
    gmacs: float | None = 0.0
    levels: Counter[int] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        if answer.error is not None:
            self.damaged += 1
            return
        self.answered += 1
        self.gmacs = None if self.gmacs is None or answer.gmacs is None else self.gmacs + answer.gmacs
        if answer.level is not None:
            self.levels[answer.level] += 1

    def lines(self, classification: Classification, seconds: float) -> list[str]:
        """The summary: how many, how fast, at what cost, and what the calibration predicted."""
        line = f"{self.answered:,} pictures in {seconds:.1f} s ({self.answered / max(seconds, 1e-9):.0f} images/s)"
        lines = [line + (f", {self.damaged:,} that could not be read" if self.damaged else "")]
        if not self.answered:
            return lines
        if self.gmacs is None:
            return [*lines, "cost: not counted, this architecture has an operation whose cost is not known"]
        deployed, setting = classification.deployed, classification.setting
        mean, most = self.gmacs / self.answered, max(deployed.costs)
        lines.append(f"mean cost {mean:.4g} GMACs a picture in the image tower, {100 * mean / most:.0f} % of the most")
        stops = ", ".join(f"{count:,} at level {level}" for level, count in sorted(self.levels.items()))
        if stops:
            threshold = "no threshold: all levels" if setting > 1 else f"threshold {setting:.4g}"
            lines.append(f"stopped: {stops} ({threshold})")
        lines += [f"keep rate {setting:g}"] if deployed.setting_name == "keep" else []
        calibration = deployed.calibration if deployed.setting_name else None
        if calibration is not None and classification.calibrated_on_these and setting == calibration.point.setting:
            point, (low, high) = calibration.point, calibration.point.gmacs_interval
            lines.append(f"calibrated: {point.gmacs:.4g} [{low:.4g}, {high:.4g}] on {calibration.pictures:,} pictures")
        return lines


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row. In files, a name that is not valid Unicode keeps its bytes."""
    if out is None:
        write = _rows(sys.stdout, jsonl=False)
        yield lambda row: write(row | {"picture": row["picture"].encode(errors="replace").decode()})
        sys.stdout.flush()
        return
    with written_whole(out) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield _rows(file, jsonl=out.suffix == ".jsonl")


def _rows(file: IO[str], jsonl: bool) -> Callable[[dict[str, Any]], None]:
    if jsonl:
        return lambda row: print(json.dumps(row), file=file)
    table: csv.DictWriter | None = None

    def write(row: dict[str, Any]) -> None:
        nonlocal table
        if table is None:
            table = csv.DictWriter(file, list(row), lineterminator="\n")
            table.writeheader()
        shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        table.writerow(shown)

    return write


def _say(text: str) -> None:
    print(text, file=sys.stderr)

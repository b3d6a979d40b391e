"""`effclip classify`: which of some labels fits each picture, at a chosen cost.

One row a picture, written as it is known: csv to the screen, or a .csv or .jsonl file; what else there is to say goes
to the error stream. torch is imported only after the command line was found right.
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

if TYPE_CHECKING:
    from common.deploy.model import Answer, Question

_SUFFIXES = (".csv", ".jsonl")
_NOBODY_READS = 128 + 13
"""The exit code by which a shell names SIGPIPE."""


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
    """Run the command line; 0 done, 1 with --strict and a damaged picture, 141 when nobody reads the rows any more.

    ValueError, for a user: a mistake.
    """
    said = parser().parse_args(arguments)
    labels = read_labels(said.labels, said.labels_file)
    templates = None if said.template is None else read_templates(said.template)
    if said.out is not None and said.out.suffix not in _SUFFIXES:
        raise ValueError(f"--out {said.out}: rows are written as {' or '.join(_SUFFIXES)}")
    from common.data.files import find_pictures
    from common.deploy.model import load
    from common.packaged import default_model
    from common.progress import bar

    total = sum(1 for _ in find_pictures(said.paths))  # also says what is not there before a model is loaded
    deployed = load(**model_arguments(said), device=said.device)
    if said.model is None:
        _say(default_model().about)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        question = deployed.ask(labels, gmacs=said.gmacs, threshold=said.threshold, templates=templates)
    for remark in remarks:
        _say(f"note: {remark.message}")
    tally, start = Tally(), time.monotonic()
    answers = question.stream(find_pictures(said.paths), said.batch_size, said.workers)
    try:
        with _writer(said.out) as write:
            for answer in bar(answers, "classifying", total):
                tally.add(answer)
                write(asdict(answer))
    except BrokenPipeError:
        # Who read the rows, such as head, has seen enough. What is not written yet must go somewhere at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    _say("\n".join(tally.lines(question, time.monotonic() - start)))
    return 1 if said.strict and tally.damaged else 0


@dataclass
class Tally:
    """What a summary needs to know of the answers so far."""

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

    def lines(self, question: Question, seconds: float) -> list[str]:
        """The summary: how many, how fast, at what cost, beside what the calibration foretold."""
        found = f"{self.answered:,} pictures in {seconds:.1f} s ({self.answered / max(seconds, 1e-9):.0f} images/s)"
        lines = [found + (f", {self.damaged:,} that could not be read" if self.damaged else "")]
        if not self.answered:
            return lines
        if self.gmacs is None:
            return [*lines, "cost: not counted, this architecture has an operation whose cost is not known"]
        mean, most = self.gmacs / self.answered, max(question.deployed.costs)
        lines.append(f"mean cost {mean:.4g} GMACs a picture in the image tower, {100 * mean / most:.0f} % of the most")
        stops = ", ".join(f"{count:,} at level {level}" for level, count in sorted(self.levels.items()))
        if stops:
            threshold = "no threshold: all levels" if question.setting > 1 else f"threshold {question.setting:.4g}"
            lines.append(f"stopped: {stops} ({threshold})")
        lines += [f"keep rate {question.setting:g}"] if question.deployed.knob == "keep" else []
        known = question.deployed.calibration if question.deployed.knob else None
        if known is not None and question.calibrated_on_these and question.setting == known.point.setting:
            low, high = known.point.gmacs_interval
            lines.append(f"calibrated: {known.point.gmacs:.4g} [{low:.4g}, {high:.4g}] on {known.pictures:,} pictures")
        return lines


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row; in files, names that are no Unicode stay the bytes they are."""
    if out is None:
        write = _rows(sys.stdout, jsonl=False)
        yield lambda row: write(row | {"picture": row["picture"].encode(errors="replace").decode()})
        sys.stdout.flush()
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
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


if __name__ == "__main__":
    sys.exit(main())

"""`effclip classify`: which of some labels fits each picture, at a chosen cost.

Each picture gives one row, as soon as it is classified: csv or JSON lines, on the screen or in a file. All other
messages go to the error stream; the first one says what decides the cost. A mistake in the command line, or a path
where nothing is, is answered before torch is imported.
"""

from __future__ import annotations

import argparse
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
from typing import TYPE_CHECKING, Any

from common.arguments import (
    CONFIDENCE,
    DTYPES,
    GMACS,
    CommandParser,
    add_first,
    add_model,
    model_arguments,
    read_labels,
    read_templates,
    whole_number,
)
from common.deploy.rows import row_writer
from common.errors import leave_closed_pipe
from common.paths import written_whole

if TYPE_CHECKING:
    from common.deploy.classification import Answer, Classification

_SUFFIXES = (".csv", ".jsonl")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip classify", description=__doc__.splitlines()[0])
    add = command.add_argument
    add(
        "paths", nargs="+", metavar="PATH", help="pictures, folders of pictures at any depth; - reads paths, one a line"
    )
    add("--labels", help='the classes, as "cat,dog"; default: those that the model was trained on')
    add("--labels-file", help="the classes in a text file, one a line")
    add(
        "--template",
        help="a prompt with {} for the label and {a} for its article, or a .txt file of such; default: the model's own",
    )
    add_model(command, default="the packaged model")
    add_first(command)
    add("--gmacs", type=GMACS, help="mean budget for a picture, 10^9 multiply-adds; needs `effclip calibrate` once")
    add("--threshold", type=CONFIDENCE, help="stop at the first level whose margin is at least this, in [0, 1]")
    add(
        "--calibration",
        metavar="NAME|FILE",
        help="follow what `effclip calibrate` stored under this name or file; default: that of a model directory, and "
        "for --gmacs that of the model",
    )
    add("--topk", type=_topk, default=1, metavar="K|all", help="how many classes a row names (default %(default)s)")
    add("--out", type=Path, help="a .csv or .jsonl file for the rows (default: to the screen)")
    add("--format", choices=("csv", "jsonl"), help="of rows on the screen (default csv); a file's suffix says its own")
    add("--stats", type=Path, metavar="FILE", help="a .json file for the summary: pictures, seconds, cost, levels")
    add("--strict", action="store_true", help="exit with code 1 when a picture could not be read")
    add("--batch-size", type=whole_number(1), default=64, help="pictures at a time (default %(default)s)")
    add("--workers", type=whole_number(1), help="threads that read pictures (default: one a core, at most 8)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--dtype", choices=DTYPES, default="float32", help="of the image tower (default %(default)s)")
    return command


def _topk(text: str) -> int:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of classes nor all")
    return sys.maxsize if text == "all" else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ValueError: a mistake in the command line or its files.

    0: done.  1: with --strict, a picture was damaged.  141: the reader of the rows has closed the pipe.
    """
    start = time.monotonic()
    args = parser().parse_args(arguments)
    labels = read_labels(args.labels, args.labels_file)
    templates = None if args.template is None else read_templates(args.template)
    _check(args)
    from common.data.account import Account
    from common.data.files import find_pictures
    from common.data.prepared import left_out_line
    from common.packaged import default_model
    from common.progress import bar

    paths, account = _given(args.paths), Account()
    total = sum(1 for _ in find_pictures(paths, account))  # a missing path is an error before torch is imported
    named = model_arguments(args)
    from common.deploy.model import load

    options = {"device": args.device, "dtype": args.dtype, "calibration": args.calibration, "first": args.first}
    deployed = load(**named, **options)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        classification = deployed.prepare(
            labels, gmacs=args.gmacs, threshold=args.threshold, templates=templates, topk=args.topk
        )
    _say(_choice(classification, args))
    if args.model is None:
        _say(default_model().about)
    for remark in remarks:
        _say(f"note: {remark.message}")
    if account.kinds:
        _say(left_out_line(account.kinds))
    tally, loaded = Tally(), time.monotonic()
    answers = classification.stream(find_pictures(paths), args.batch_size, args.workers)
    try:
        with _writer(args.out, args.format, classification.topk) as write:
            for answer in bar(answers, "classifying", total):
                tally.add(answer)
                write(answer)
    except BrokenPipeError:  # the reader of the rows, such as head, has stopped
        return leave_closed_pipe()
    stats = tally.stats(classification, loaded - start, time.monotonic() - start)
    _say("\n".join(lines(stats)))
    if args.stats is not None:
        with written_whole(args.stats) as part:
            part.write_text(json.dumps(stats, indent=1) + "\n")
    return 1 if args.strict and tally.damaged else 0


def _check(args: argparse.Namespace) -> None:
    """ValueError: arguments do not go together, or a file has another suffix."""
    if args.out is not None and args.out.suffix not in _SUFFIXES:
        raise ValueError(f"--out {args.out}: rows are written as {' or '.join(_SUFFIXES)}")
    if args.out is not None and args.format not in (None, args.out.suffix[1:]):
        raise ValueError(f"--format {args.format} is not what --out {args.out} says; leave one of them out")
    if args.stats is not None and args.stats.suffix != ".json":
        raise ValueError(f"--stats {args.stats}: the summary is written as .json")
    for file in (args.out, args.stats):
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file")
    if args.first is not None and (args.threshold, args.gmacs, args.calibration) == (None, None, None):
        raise ValueError(
            f"--first {args.first} needs --threshold, --gmacs or --calibration, which say when its answer stands"
        )
    if args.gmacs is not None and args.threshold is not None:
        raise ValueError("--gmacs and --threshold are two ways to say one thing; give one of them")
    if args.calibration is not None and args.threshold is not None:
        raise ValueError("--calibration and --threshold both choose a threshold; give one of them")


def _given(paths: Sequence[str]) -> list[str]:
    """The paths of the command line; "-" stands for those on the input stream, one a line. ValueError: no path."""
    if "" in paths:
        raise ValueError("a path is empty, as of a variable that is not set; name a picture or a folder")
    given = [line for path in paths for line in (_lines_of_input() if path == "-" else [path])]
    if not given:
        raise ValueError("no path came over the input stream; give one a line")
    return given


def _lines_of_input() -> list[str]:
    """The lines of the input stream that are not empty; a name that is not valid Unicode keeps its bytes."""
    return list(filter(None, (os.fsdecode(line).strip("\r\n") for line in sys.stdin.buffer)))


def _choice(classification: Classification, args: argparse.Namespace) -> str:
    """What decides how much a picture costs: the first line of the command."""
    deployed, setting, used = classification.deployed, classification.setting, classification.calibration
    if deployed.setting_name is None:
        return "every picture takes the one path of this model"
    what = "all levels" if setting > 1 else f"{deployed.setting_name.replace('keep', 'keep rate')} {setting:.4g}"
    if used is not None:
        wish = " ".join(f"{name} {value:g}" for name, value in used.wish.items() if value is not None)
        made = f", made for {wish} on {used.conditions.get('data')}" if wish else ""
        return f"{what}, by the calibration {deployed.calibration_file}{made}"
    asked = args.threshold is not None or args.gmacs is not None
    return f"{what}, as asked" if asked else f"{what}: neither --gmacs, --threshold nor --calibration asks for less"


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

    def stats(self, classification: Classification, start_up: float, seconds: float) -> dict[str, Any]:
        """The summary as plain values.

        start_up, seconds: since the command began, until the model was ready and until the last picture.
        """
        deployed, setting = classification.deployed, classification.setting
        known = self.gmacs is not None and self.answered > 0
        used = classification.calibration
        foretold = used is not None and classification.calibrated_on_these and setting == used.point.setting
        return {
            "pictures": self.answered,
            "damaged": self.damaged,
            "seconds": seconds,
            "start_up_seconds": start_up,
            "pictures_per_second": self.answered / max(seconds - start_up, 1e-9),
            "mean_gmacs": self.gmacs / self.answered if known else None,
            "most_gmacs": max(deployed.costs) if known else None,
            "setting": deployed.setting_name,
            "value": setting,
            "levels": {str(level): count for level, count in sorted(self.levels.items())},
            "calibration": str(deployed.calibration_file) if used is not None else None,
            "calibrated_gmacs": [used.point.gmacs, *used.point.gmacs_interval] if foretold else None,
            "calibrated_on": used.pictures if foretold else None,
            "device": deployed.device,
            "dtype": deployed.dtype,
        }


def lines(stats: dict[str, Any]) -> list[str]:
    """The summary in words: how many, how fast, at what cost, and what the calibration predicted."""
    line = f"{stats['pictures']:,} pictures in {stats['seconds']:.1f} s, {stats['start_up_seconds']:.1f} s of them to "
    line += f"start; then {stats['pictures_per_second']:.0f} images/s"
    result = [line + (f", {stats['damaged']:,} that could not be read" if stats["damaged"] else "")]
    if not stats["pictures"]:
        return result
    if stats["mean_gmacs"] is None:
        return [*result, "cost: not counted, this architecture has an operation whose cost is not known"]
    mean, setting = stats["mean_gmacs"], stats["value"]
    share = 100 * mean / stats["most_gmacs"]
    result.append(f"mean cost {mean:.4g} GMACs a picture in the image tower, {share:.0f} % of the most")
    stops = ", ".join(f"{count:,} at level {level}" for level, count in stats["levels"].items())
    if stops:
        result.append(f"stopped: {stops} ({'no threshold: all levels' if setting > 1 else f'threshold {setting:.4g}'})")
    result += [f"keep rate {setting:g}"] if stats["setting"] == "keep" else []
    if stats["calibrated_gmacs"] is not None:
        gmacs, low, high = stats["calibrated_gmacs"]
        result.append(f"calibrated: {gmacs:.4g} [{low:.4g}, {high:.4g}] on {stats['calibrated_on']:,} pictures")
    return result


@contextmanager
def _writer(out: Path | None, screen: str | None, topk: int) -> Iterator[Callable[[Answer], None]]:
    """A function that writes one answer. screen: the format where there is no file.  topk: the classes in a row."""
    jsonl = screen == "jsonl" if out is None else out.suffix == ".jsonl"
    with row_writer(out, jsonl) as write:
        yield lambda answer: write(_row(answer, jsonl, topk))


def _row(answer: Answer, jsonl: bool, topk: int) -> dict[str, Any]:
    """An answer by column. Further classes are a list "top" in JSON, and columns label_2 and so on in csv."""
    row = {name: value for name, value in asdict(answer).items() if name != "top"}
    if jsonl:
        return row | ({"top": answer.top} if topk > 1 else {})
    for place in range(1, topk):
        label, probability = answer.top[place] if answer.top else (None, None)
        row |= {f"label_{place + 1}": label, f"probability_{place + 1}": probability}
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr)

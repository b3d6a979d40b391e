"""Classify pictures with the exported model in this folder: one row for each picture, as soon as it is classified.

It needs Python 3.11 with numpy, Pillow and onnxruntime, and for class names of your own also tokenizers. Rows go to the
screen as csv, or to a .csv or .jsonl file; all other messages go to the error stream. Exit codes: 0 done, 1 a mistake,
or with --strict a picture that could not be read, 2 wrong usage, 130 interrupted, 141 the reader of the rows went away,
143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from common.arguments import GMACS, number, read_labels, read_templates, whole_number
from common.data.prepared import SPECIAL, SUFFIXES, is_special, is_system_file, kind_of, left_out_line
from common.deploy.rows import row_writer
from common.deploy.runtime import ALL_LEVELS, PROVIDERS, EarlyExit, keep_within
from common.errors import leave_closed_pipe
from common.paths import written_whole

_URL = re.compile(r"https?://", re.IGNORECASE)
_URL_BYTES, _URL_SECONDS = 2**26, 20
_MARGIN = number("a margin in [0, 1], or 2 for all levels", lambda value: 0 <= value <= 1 or value == ALL_LEVELS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = command.add_argument
    add("paths", nargs="+", metavar="PATH", help="pictures, folders at any depth, URLs, or - for a list on stdin")
    add("--folder", type=Path, default=Path(__file__).parent, help="the exported folder (default: this program's)")
    add("--allow-urls", action="store_true", help="fetch pictures that are named by http:// or https://")
    add("--labels", help='other classes, as "cat,dog"')
    add("--labels-file", help="other classes in a text file, one a line")
    add("--template", help="a prompt with {} for the label and {a} for its article, or a .txt file of such")
    cost = command.add_mutually_exclusive_group()
    cost.add_argument("--threshold", type=_MARGIN, help="stop at the first level whose margin reaches it; 2: never")
    cost.add_argument("--gmacs", type=GMACS, help="mean budget for a picture: calibrated levels, or a keep rate")
    cost.add_argument("--keep", type=float, help="share of the tokens that stays, one of the folder's keep rates")
    add("--out", type=Path, help="a .csv or .jsonl file for the rows")
    add("--jsonl", action="store_true", help="rows on the screen as JSON lines")
    add("--embeddings", type=Path, help="a .npy file for the embeddings [pictures,E], in the order of the rows")
    add("--strict", action="store_true", help="exit with code 1 when a picture could not be read")
    add("--batch-size", type=whole_number(1), default=64, help="pictures at a time (default %(default)s)")
    add("--workers", type=whole_number(1), help="threads that read pictures (default: one a core, at most 8)")
    add("--threads", type=int, help="threads of ONNX Runtime (default: its own choice)")
    add("--provider", choices=PROVIDERS, default="cpu", help="what runs the graphs (default %(default)s)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a mistake is one sentence on the error stream."""
    args = parser().parse_args(arguments)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            return leave_closed_pipe()
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + 2


def _run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    _check_options(args)
    labels, templates = read_labels(args.labels, args.labels_file), args.template and read_templates(args.template)
    _check(args.paths, args.allow_urls)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        keep = args.keep if args.gmacs is None else keep_within(args.folder, args.gmacs)
        model = EarlyExit(args.folder, args.provider, args.threads, keep)
    if labels or templates:
        model.name_classes(labels or model.names, templates)
    if args.embeddings is not None and len(model.members) > 1:
        raise ValueError("--embeddings: those of a cascade's two models lie in two spaces; export the models alone")
    if model.classes is None and args.embeddings is None:
        raise ValueError("this folder names no classes; give --labels, or --embeddings for embeddings alone")
    if model.classes is None and (args.threshold, args.gmacs) != (None, None):
        raise ValueError("--threshold and --gmacs need classes to be sure of; give --labels, or leave them out")
    threshold = _threshold(model, args)
    _say("\n".join([*(f"note: {remark.message}" for remark in remarks), *_setting(model, threshold, labels, args)]))
    levels, kinds, damaged, gmacs = Counter[int](), Counter[str](), 0, 0.0
    sources = _sources(args.paths, kinds)
    answers = model.classify(
        sources, threshold, args.batch_size, args.workers, lambda source: model.pixels(_opened(source, args.allow_urls))
    )
    jsonl = args.jsonl if args.out is None else args.out.suffix == ".jsonl"
    with row_writer(args.out, jsonl) as write, _embeddings(args.embeddings, model.embed_dim) as store:
        for answer, embedding in answers:
            write(asdict(answer))
            store(embedding)
            damaged += answer.error is not None
            if answer.error is None:
                levels[answer.level or 0] += 1
                gmacs += answer.gmacs or 0.0
        if not (damaged or levels):
            raise ValueError(f"no picture in {', '.join(args.paths)}; name pictures, or a folder that holds some")
    if kinds:
        _say(left_out_line(kinds))
    _say("\n".join(_summary(model, levels, damaged, gmacs, time.monotonic() - start)))
    return 1 if args.strict and damaged else 0


def _check_options(args: argparse.Namespace) -> None:
    """ValueError: an output that cannot be written, or options that contradict each other."""
    for file, suffixes in ((args.out, (".csv", ".jsonl")), (args.embeddings, (".npy",))):
        if file is not None and file.suffix not in suffixes:
            raise ValueError(f"{file} is no {' or '.join(suffixes)} file, as what is written there needs")
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file")
    if args.jsonl and args.out is not None:
        raise ValueError("--jsonl is for the screen; name a .jsonl file with --out instead")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise ValueError(f"--threads {args.threads} must be a number from 1 to 1,024")


def _threshold(model: EarlyExit, args: argparse.Namespace) -> float | None:
    """The threshold that the arguments choose; None: all levels."""
    if args.threshold is not None:
        if model.levels == 1:
            raise ValueError(f"--threshold {args.threshold:g}: this model has no levels to stop at; leave it out")
        return args.threshold
    return model.threshold if args.gmacs is None else model.threshold_for(args.gmacs)


def _setting(
    model: EarlyExit, threshold: float | None, labels: list[str] | None, args: argparse.Namespace
) -> list[str]:
    """What runs, in words."""
    if model.levels == 1:
        keep = model.about["setting"].get("keep")
        rate = "" if keep is None else f", at keep rate {keep:g}"
        return [f"{model.about['model']}: every picture takes the whole way{rate}"]
    lines = [
        f"{model.about['model']}: threshold {threshold:g}"
        if threshold is not None
        else f"{model.about['model']}: all {model.levels} levels"
    ]
    calibrated = args.threshold is None and threshold not in (None, ALL_LEVELS)
    if calibrated:
        lines[0] += ", calibrated"
    if calibrated and (labels or args.template or not model.about["calibrated_on_these_classes"]):
        lines.append(
            "note: it was calibrated with other labels or prompts, so the mean cost may differ from what it says"
        )
    return lines


def _summary(model: EarlyExit, levels: Counter[int], damaged: int, gmacs: float, seconds: float) -> list[str]:
    """How many pictures, how fast, at what cost."""
    count = levels.total()
    line = f"{count:,} pictures in {seconds:.1f} s from start to end"
    lines = [line + (f", {damaged:,} that could not be read" if damaged else "")]
    costs = model.about["gmacs"]
    if count and costs:
        mean = gmacs / count
        lines.append(
            f"mean cost {mean:.4g} GMACs a picture in the image tower, {100 * mean / costs[-1]:.0f} % of the most"
        )
    if model.levels > 1 and count:
        lines.append("stopped: " + ", ".join(f"{levels[level]:,} at level {level}" for level in sorted(levels)))
    return lines


def _check(paths: Sequence[str], urls: bool) -> None:
    """ValueError: a path that is not there, a folder without a picture, or a URL that was not allowed."""
    for path in paths:
        if not path:
            raise ValueError("a path is empty, as of a variable that is not set; name a picture or a folder")
        if _URL.match(path):
            if not urls:
                raise ValueError(f"{path} is a URL; --allow-urls fetches it")
        elif path != "-" and not Path(path).exists():
            raise ValueError(f"no picture and no folder at {Path(path).absolute()}")
        elif Path(path).is_dir() and next(_below(Path(path), set(), Counter()), None) is None:
            raise ValueError(f"{Path(path).absolute()} holds no picture ({', '.join(SUFFIXES)}); name one that does")


def _sources(paths: Sequence[str], kinds: Counter[str]) -> Iterator[str]:
    """The pictures that the arguments name, in turn; a list on stdin is read as it comes. kinds: as of ``_below``."""
    for path in paths:
        if path == "-":
            yield from filter(None, (os.fsdecode(line).strip("\r\n") for line in sys.stdin.buffer))
        elif not _URL.match(path) and Path(path).is_dir():
            yield from _below(Path(path), set(), kinds)
        else:
            yield path


def _below(folder: Path, seen: set[Path], kinds: Counter[str]) -> Iterator[str]:
    """The pictures of a folder at any depth: those directly in it first, in the order of their names.

    System files are left out, and a folder that was reached before, by a link. kinds: counts the other files that are.
    ValueError: an unreadable folder.
    """
    seen.add(folder.resolve())
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be read ({error.strerror}); make it readable") from error
    entries = [entry for entry in entries if not is_system_file(entry.name)]
    inner = [entry for entry in entries if entry.is_dir()]
    for entry in entries:
        if entry in inner:
            continue
        special = is_special(entry, entry.is_file())
        if not special and entry.name.lower().endswith(SUFFIXES):
            yield str(entry)
        else:
            kinds[SPECIAL if special else kind_of(entry)] += 1
    for entry in inner:
        if entry.resolve() not in seen:
            yield from _below(entry, seen, kinds)


def _opened(source: str, urls: bool) -> str | BytesIO:
    """A file's name as it is, or the bytes of a URL. ValueError: not allowed, or not answered."""
    if not _URL.match(source):
        return source
    if not urls:
        raise ValueError("a URL; --allow-urls fetches it")
    from http.client import HTTPException
    from urllib import request

    opener = request.OpenerDirector()  # no file:, ftp: or data:, to which a server might redirect
    for kind in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect", "Unknown"):
        opener.add_handler(getattr(request, f"{kind}Handler")())
    opener.add_handler(request.HTTPErrorProcessor())
    try:
        with opener.open(request.Request(source, headers={"User-Agent": "effclip"}), timeout=_URL_SECONDS) as reply:
            data = reply.read(_URL_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if len(data) > _URL_BYTES:
        raise ValueError(f"more than {_URL_BYTES:,} bytes")
    return BytesIO(data)


@contextmanager
def _embeddings(out: Path | None, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds one embedding [E] to a .npy file. The count is written into its header at the end."""
    if out is None:
        yield lambda embedding: None
        return
    count = 0

    def header(file: IO[bytes]) -> None:
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})

    def keep(embedding: np.ndarray) -> None:
        nonlocal count
        count += 1
        file.write(embedding.astype("<f4").tobytes())

    with written_whole(out) as part, part.open("wb") as file:
        header(file)  # numpy leaves room in it for a greater count
        yield keep
        header(file)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + 15))  # an exit removes what is unfinished
    sys.exit(main())

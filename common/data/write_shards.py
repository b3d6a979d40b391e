"""Pictures with captions -> WebDataset shards: ``python -m common.data.write_shards --help``.

There are three sources: a folder of pictures, a table of paths and captions, and a download of img2dataset (already
shards: the command verifies them in place and writes their manifest). The source alone determines the shard of every
sample, so the same command continues a killed run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from PIL import Image

from common.data.account import Account, Unusable
from common.data.files import files_below
from common.data.images import SHARD_FORMATS, open_picture
from common.data.packing import (
    MANIFEST,
    RECORDS,
    Entry,
    Reject,
    compare_digests,
    digest,
    forget_records,
    pack,
    read_manifest,
    write_manifest,
    write_tar,
)
from common.data.tables import read_json, read_table, text_cell
from common.data.tar import PICTURES, Shard, read_shard
from common.errors import sentence
from common.tokenizer import is_empty

REJECTED = "rejected.tsv"


class Row(NamedTuple):
    """A picture's path, its caption (None: in the .txt beside it), its label (None: the table has none)."""

    path: str
    caption: str | None
    label: Any = None


def read_rows(file: Path, path: str = "path", caption: str = "caption", label: str | None = None) -> list[Row]:
    """The rows of a .csv, .tsv or .parquet file with these column names.

    ValueError: the file is missing, unreadable or of another kind, has no such column, or a cell holds no text.
    """
    if not file.is_file():
        raise ValueError(f"no table at {file.absolute()}")
    return [
        Row(text_cell(file, line, path), text_cell(file, line, caption), None if label is None else line.cells[label])
        for line in read_table(file, [path, caption] + ([label] if label else []))
    ]


def read_folder(folder: Path, captions: Path | None = None, account: Account | None = None) -> list[Row]:
    """A row for every picture in a folder, at any depth, with paths relative to the folder.

    captions: a table with the columns path and caption; a picture that it does not list has no caption.
    account: counts the files that are left out.
    ValueError: no such folder, an unreadable one below it, or a bad table.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder.absolute()}")
    account = Account() if account is None else account
    paths, texts = [], []
    for file in files_below(folder, account):
        name = file.relative_to(folder).as_posix()
        suffix = file.suffix[1:].lower()
        if suffix in PICTURES:
            paths.append(name)
        elif suffix == "txt" and captions is None:
            texts.append(name)
        elif captions is None or file.resolve() != captions.resolve():
            account.ignore("kind that is not read", name)
    if captions is None:
        named = {path.rpartition(".")[0] for path in paths}
        for text in texts:
            if text.rpartition(".")[0] not in named:
                account.ignore("caption without a picture", text)
        return [Row(path, None) for path in sorted(paths)]
    rows = read_rows(captions)
    # A table may name pictures by absolute paths, or as ./x.jpg.
    named = {os.path.normpath(folder / row.path) for row in rows}
    return rows + [Row(path, "") for path in sorted(paths) if os.path.normpath(folder / path) not in named]


def sample_of(index: int, row: Row, root: Path) -> dict[str, Any]:
    """One row as a sample: the picture's own bytes, the caption, and a json with path and label.

    ValueError, OSError: picture or caption are missing, damaged or empty, or the label is no whole number.
    """
    if "://" in row.path:
        raise Unusable("no picture", f"{row.path} is a URL; download the pictures first, for instance with img2dataset")
    picture = root / row.path
    try:
        caption = (picture.with_suffix(".txt").read_text("utf-8-sig") if row.caption is None else row.caption).strip()
    except (OSError, ValueError) as error:
        raise Unusable("no caption" if isinstance(error, OSError) else "unusable caption", error) from error
    if is_empty(caption):
        raise Unusable("no caption", "empty caption")
    facts: dict[str, Any] = {"path": row.path}
    if row.label is not None:
        facts["label"] = _label(row.label)
    try:
        content = picture.read_bytes()
    except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
        raise Unusable("no picture", error) from error
    open_picture(io.BytesIO(content), SHARD_FORMATS)
    with Image.open(io.BytesIO(content), formats=SHARD_FORMATS) as image:
        extension = {"PNG": "png", "WEBP": "webp"}.get(image.format, "jpg")
    members = {extension: content, "txt": caption.encode(), "json": json.dumps(facts).encode()}
    return {"__key__": f"{index:09d}", **members}


def _label(value: Any) -> int:
    """A table's label; pandas writes whole numbers as 3.0 where some are missing."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise Unusable("unusable label", f"the label {value!r} is no whole number")
    return int(number)


def write_rows(path: Path, rows: Sequence[tuple[int, Row]], root: Path) -> tuple[Entry, list[Reject]]:
    """Write one shard of numbered rows; returns its entry and the rejects."""
    rejected: list[Reject] = []

    def samples() -> Iterator[dict[str, Any]]:
        for index, row in rows:
            try:
                yield sample_of(index, row, root)
            except Unusable as error:
                rejected.append((row.path, str(error), error.reason))

    return write_tar(path, samples()), rejected


def pack_rows(
    rows: Sequence[Row],
    root: Path,
    out: Path,
    *,
    source: str,
    samples_per_shard: int = 10_000,
    max_rejected: float = 0.01,
    workers: int | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write rows, in one fixed random order, as shards with their manifest; returns the manifest.

    root: the folder that the rows' paths are relative to.
    max_rejected: the share of rows that may be rejected; ``rejected.tsv`` lists them with reasons.
    facts: more entries of the manifest.
    ValueError: no rows, too many rejects, or a folder with other shards.
    """
    _refuse_other_shards(out)
    if not rows:
        raise ValueError(f"{source} has no samples")
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {samples_per_shard} must be at least 1")
    numbered = list(enumerate(rows))
    Random(0).shuffle(numbered)  # tables are often sorted by class, and readers shuffle little more than shards
    parts = [numbered[start : start + samples_per_shard] for start in range(0, len(rows), samples_per_shard)]
    jobs = {f"{number:05d}.tar": part for number, part in enumerate(parts)}
    plan = hashlib.sha256(f"{root.absolute()} {samples_per_shard}".encode())
    for row in rows:
        plan.update(f"{row!r} {_version(root / row.path, row.caption is None)}".encode())
    write = partial(write_rows, root=root)
    return _pack(out, jobs, write, plan.hexdigest(), len(rows), max_rejected, workers, source=source, **facts)


def _refuse_other_shards(folder: Path) -> None:
    """ValueError: a folder holds shards that no manifest and no unfinished run of this program describes."""
    if read_manifest(folder) is None and not (folder / RECORDS).is_dir():
        there = min(folder.glob("*.tar"), default=None)
        if there is not None:
            raise ValueError(
                f"{folder} holds {there.name} and no {MANIFEST}, so it may be anyone's; choose another folder, or "
                "remove the shards in this one"
            )


def _version(picture: Path, captioned: bool) -> list[int]:
    """What changes with a picture's file, and with the caption beside it.  captioned: whether that is read."""
    try:
        stats = [picture.stat(), *([picture.with_suffix(".txt").stat()] if captioned else [])]
    except OSError:  # said where it is read
        return []
    return [stats[0].st_size, *(number for stat in stats[1:] for number in (stat.st_size, stat.st_mtime_ns))]


def _pack(folder, jobs, write, plan, total, max_rejected, workers, *, source, account=None, **facts) -> dict[str, Any]:
    if not 0 <= max_rejected < 1:
        raise ValueError(f"--max-rejected {max_rejected} must be a fraction in [0, 1)")
    manifest = read_manifest(folder)
    if manifest is None:
        entries, rejected = pack(
            folder, jobs, write, plan=plan, most_rejected=int(max_rejected * total), workers=workers
        )
        account = Account() if account is None else account
        account.delivered = total - len(rejected)
        for what, _, reason in rejected:
            account.rejected[reason] += 1
            account.examples.setdefault(reason, what)
        with open(folder / REJECTED, "w", encoding="utf-8", errors="backslashreplace") as file:
            rows = [(what, why) for what, why, _ in rejected]
            csv.writer(file, delimiter="\t").writerows([("what", "why"), *rows])
        write_manifest(folder, entries, source, **facts, rejected=len(rejected), account=account.to_dict(), plan=plan)
        manifest = read_manifest(folder)
        print(account)
    elif manifest.get("plan") != plan:
        raise ValueError(
            f"{folder} already holds shards of {manifest.get('source')!r}, of other samples; choose another folder, or "
            f"remove its shards and its {MANIFEST} where the samples have changed"
        )
    else:
        compare_digests(folder, manifest["shards"])
        print(f"packed before, on {manifest['date']}; every byte read again and equal to {MANIFEST}")
    forget_records(folder)
    return manifest


def expected_samples(tar: Path) -> int:
    """The number of samples in a shard by img2dataset's own record.

    ValueError: the record is missing, because the shard is not finished.
    """
    stats, table = tar.with_name(f"{tar.stem}_stats.json"), tar.with_suffix(".parquet")
    if stats.is_file():
        successes = read_json(stats, dict, "img2dataset's statistics").get("successes")
        if not isinstance(successes, int):
            raise ValueError(f"{stats} has no number of successes; remove {tar.stem}* and run img2dataset again")
        return successes
    if table.is_file():
        return sum(line.cells["status"] == "success" for line in read_table(table, ["status"]))
    raise ValueError(f"{tar} has neither {stats.name} nor {table.name}: run img2dataset again, which finishes it")


def verify_download(path: Path, expected: int) -> tuple[Entry, list[Reject]]:
    """Read one of img2dataset's shards to its end; returns its entry and its incomplete samples.

    ValueError: the shard is truncated, or its number of samples is not the expected one.
    """
    account, count, incomplete = Account(), 0, []
    for sample in read_shard(Shard(str(path), None), account):
        count += 1
        text = sample.get("txt", b"").decode("utf-8-sig", "replace")
        lacking = ["no picture"] if not any(sample.get(name) for name in PICTURES) else []
        lacking += ["no caption"] if is_empty(text) else []
        if lacking:
            incomplete.append((f"{path.name}:{sample['__key__']}", " and ".join(lacking), lacking[0]))
    if account.bad or count != expected:
        raise ValueError(
            f"{path} holds {count} samples, img2dataset says {expected}{'; ' + account.last if account.bad else ''}; "
            f"remove {path.stem}.tar and {path.stem}_stats.json and run img2dataset again"
        )
    return {"samples": count, **digest(path)}, incomplete


def verify_downloads(
    folder: Path, *, source: str, max_rejected: float = 0.01, workers: int | None = None, **facts: Any
) -> dict[str, Any]:
    """Verify img2dataset's shards in their folder and write their manifest; returns the manifest.

    max_rejected: the share of samples that may lack a picture or a caption; they stay in the shards, and the loader
        counts and skips them.
    ValueError: no shards, an unfinished or damaged one, or too many incomplete samples.
    """
    tars = sorted(folder.glob("*.tar"))
    lost = sorted({f.name.removesuffix("_stats.json") for f in folder.glob("*_stats.json")} - {t.stem for t in tars})
    if not tars or lost:
        missing = f"{lost[0]}.tar is missing, its statistics are there" if lost else "there are no shards"
        raise ValueError(f"{folder.absolute()}: {missing}; run img2dataset with --output_format webdataset")
    _say_gaps(tars)
    jobs = {tar.name: expected_samples(tar) for tar in tars}
    plan = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    total = sum(jobs.values())
    return _pack(folder, jobs, verify_download, plan, total, max_rejected, workers, source=source, **facts)


def _say_gaps(tars: Sequence[Path]) -> None:
    """Warn of numbers that are missing among those of the shards."""
    numbers = {int(tar.stem) for tar in tars if tar.stem.isdigit()}
    gaps = sorted(set(range(max(numbers, default=-1))) - numbers)
    if gaps:
        print(
            f"warning: {len(gaps)} numbers are missing among the shards, first {gaps[0]:05d}; if they were lost, run "
            "img2dataset again, and do not name them in the recipe's braces",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.data.write_shards",
        description="Pack pictures with captions into WebDataset shards with a manifest (sample counts, sha256).",
        epilog="A run that was killed is started again with the same command: finished shards are kept.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--workers", type=int, help="processes (default: one per core)")
    common.add_argument(
        "--max-rejected",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of unusable samples that may be left out; more is an error (default 0.01)",
    )
    common.add_argument("--source", help="what the manifest says about the origin (default: the path)")
    common.add_argument(
        "--variant",
        help="which of several versions this is, such as openai or declip for YFCC15M; "
        "recipes that name another one refuse the shards",
    )
    packing = argparse.ArgumentParser(add_help=False, parents=[common])
    packing.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default 10000")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{folder,table,img2dataset}")
    kind = kinds.add_parser("folder", parents=[packing], help="pictures, each with NAME.txt beside it or in a table")
    kind.add_argument("input", type=Path, help="folder of jpg, png and webp pictures, searched to its depth")
    kind.add_argument("out", type=Path, help="folder for the shards")
    kind.add_argument(
        "--captions",
        type=Path,
        metavar="TABLE",
        help=".csv, .tsv or .parquet with the columns path (relative to the folder) and caption",
    )
    kind = kinds.add_parser("table", parents=[packing], help="a .csv, .tsv or .parquet of paths and captions")
    kind.add_argument("input", type=Path, help="the table, its columns named in the first line")
    kind.add_argument("out", type=Path, help="folder for the shards")
    kind.add_argument("--root", type=Path, help="folder that relative paths start from (default: the table's)")
    kind.add_argument("--path-column", default="path", metavar="NAME", help="default path")
    kind.add_argument("--caption-column", default="caption", metavar="NAME", help="default caption")
    kind.add_argument("--label-column", metavar="NAME", help="whole numbers, stored as labels (default: none)")
    kind = kinds.add_parser("img2dataset", parents=[common], help="verify a finished download where it stands")
    kind.add_argument("input", type=Path, help="folder of img2dataset's webdataset output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 1: a mistake or a refusal of the disk, in one sentence, 2: wrong usage."""
    args = _parser().parse_args(argv)
    facts = {"variant": args.variant} if args.variant else {}
    options = {"source": args.source or str(args.input), "max_rejected": args.max_rejected, "workers": args.workers}
    try:
        if args.kind == "img2dataset":
            out, manifest = args.input, verify_downloads(args.input, **options, **facts)
        else:
            out = args.out
            if args.kind == "folder":
                account = Account()
                root, rows = args.input, read_folder(args.input, args.captions, account)
                facts["account"] = account
            else:
                root = args.root or args.input.parent
                rows = read_rows(args.input, args.path_column, args.caption_column, args.label_column)
            manifest = pack_rows(rows, root, out, samples_per_shard=args.samples_per_shard, **options, **facts)
    except (ValueError, OSError) as error:
        text = error if isinstance(error, ValueError) else sentence(error) or error
        print(f"write_shards: error: {text}", file=sys.stderr)
        return 1
    names = list(manifest["shards"])
    print(f"{out}: {manifest['samples']} samples in {len(names)} shards, {names[0]} to {names[-1]}")
    print(f"left out or incomplete: {manifest['rejected']} ({out / REJECTED})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

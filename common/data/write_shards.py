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
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from PIL import Image

from common.data.files import files_below
from common.data.packing import Entry, Reject, digest, forget_records, pack, read_manifest, write_manifest, write_tar
from common.data.reader import PICTURES, Damage, Shard, read_shard

REJECTED = "rejected.tsv"


class Row(NamedTuple):
    """A picture's path, its caption (None: in the .txt beside it), its label (None: the table has none)."""

    path: str
    caption: str | None
    label: Any = None


def read_table(file: Path, path: str = "path", caption: str = "caption", label: str | None = None) -> list[Row]:
    """The rows of a .csv, .tsv or .parquet file with these column names.

    ValueError: the file is missing, unreadable or of another kind, or has no such column.
    """
    wanted = [path, caption] + ([label] if label else [])
    if not file.is_file():
        raise ValueError(f"no table at {file.absolute()}")
    try:
        columns = (_read_parquet if file.suffix == ".parquet" else _read_text_table)(file, wanted)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    # A cell without a value becomes an empty text, which is refused later; None means "no such column".
    cells = ["" if value is None else value for column in columns for value in column]
    return [Row(*cells[place :: len(columns[0])]) for place in range(len(columns[0]))]


def _check_columns(file: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]!r}; it has {list(there)}; name it with --*-column")


def _read_text_table(file: Path, wanted: Sequence[str]) -> list[list[str]]:
    if file.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{file} is not a .csv, .tsv or .parquet file")
    with open(file, newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="," if file.suffix == ".csv" else "\t")
        _check_columns(file, wanted, rows.fieldnames or [])
        cells = [[row[name] for name in wanted] for row in rows]
    return [list(column) for column in zip(*cells, strict=True)] or [[] for _ in wanted]


def _read_parquet(file: Path, wanted: Sequence[str]) -> list[list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"reading {file} needs pyarrow: pip install 'efficient-clip[data]'") from error
    try:
        _check_columns(file, wanted, parquet.read_schema(file).names)
        table = parquet.read_table(file, columns=list(wanted))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return [table[name].to_pylist() for name in wanted]


def read_folder(folder: Path, captions: Path | None = None) -> list[Row]:
    """A row for every picture in a folder, at any depth, with paths relative to the folder.

    captions: a table with the columns path and caption; a picture that it does not list has no caption.
    ValueError: no such folder, an unreadable one below it, or a bad table.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder.absolute()}")
    pictures = sorted(p for p in files_below(folder) if p.suffix[1:].lower() in PICTURES)
    paths = [picture.relative_to(folder).as_posix() for picture in pictures]
    if captions is None:
        return [Row(path, None) for path in paths]
    rows = read_table(captions)
    named = {Path(row.path).as_posix() for row in rows}
    return rows + [Row(path, "") for path in paths if path not in named]


def sample_of(index: int, row: Row, root: Path) -> dict[str, Any]:
    """One row as a sample: the picture's own bytes, the caption, and a json with path and label.

    ValueError, OSError: picture or caption are missing, damaged or empty, or the label is no whole number.
    """
    picture = root / row.path
    caption = (picture.with_suffix(".txt").read_text("utf-8") if row.caption is None else row.caption).strip()
    if not caption:
        raise ValueError("empty caption")
    facts: dict[str, Any] = {"path": row.path}
    if row.label is not None:
        facts["label"] = int(str(row.label))
    content = picture.read_bytes()
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
        extension = {"PNG": "png", "WEBP": "webp"}.get(image.format, "jpg")
        image.draft("RGB", (1, 1))  # a JPEG is read to its end, but at an eighth of its size
        image.load()
    members = {extension: content, "txt": caption.encode(), "json": json.dumps(facts).encode()}
    return {"__key__": f"{index:09d}", **members}


def write_rows(path: Path, rows: Sequence[tuple[int, Row]], root: Path) -> tuple[Entry, list[Reject]]:
    """Write one shard of numbered rows; returns its entry and the rejects."""
    rejected: list[Reject] = []

    def samples() -> Iterator[dict[str, Any]]:
        for index, row in rows:
            try:
                yield sample_of(index, row, root)
            except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
                rejected.append((row.path, str(error)))

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
        plan.update(repr(row).encode())
    write = partial(write_rows, root=root)
    return _pack(out, jobs, write, plan.hexdigest(), len(rows), max_rejected, workers, source=source, **facts)


def _pack(folder, jobs, write, plan, total, max_rejected, workers, *, source, **facts) -> dict[str, Any]:
    if not 0 <= max_rejected < 1:
        raise ValueError(f"--max-rejected {max_rejected} must be a fraction in [0, 1)")
    manifest = read_manifest(folder)
    if manifest is None:
        entries, rejected = pack(
            folder, jobs, write, plan=plan, most_rejected=int(max_rejected * total), workers=workers
        )
        with open(folder / REJECTED, "w", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t").writerows([("what", "why"), *rejected])
        write_manifest(folder, entries, source, **facts, rejected=len(rejected), plan=plan)
        manifest = read_manifest(folder)
    elif manifest.get("plan") != plan:
        raise ValueError(
            f"{folder} already holds shards of {manifest.get('source')!r}, of other samples; choose another folder, or "
            "remove its manifest.json where they have changed or are to be replaced"
        )
    forget_records(folder)
    return manifest


def expected_samples(tar: Path) -> int:
    """The number of samples in a shard by img2dataset's own record.

    ValueError: the record is missing, because the shard is not finished.
    """
    stats, table = tar.with_name(f"{tar.stem}_stats.json"), tar.with_suffix(".parquet")
    if stats.is_file():
        return int(json.loads(stats.read_text())["successes"])
    if table.is_file():
        return Counter(_read_parquet(table, ["status"])[0])["success"]
    raise ValueError(f"{tar} has neither {stats.name} nor {table.name}: run img2dataset again, which finishes it")


def verify_download(path: Path, expected: int) -> tuple[Entry, list[Reject]]:
    """Read one of img2dataset's shards to its end; returns its entry and its incomplete samples.

    ValueError: the shard is truncated, or its number of samples is not the expected one.
    """
    damage, count, incomplete = Damage(limit=1.0), 0, []
    for sample in read_shard(Shard(str(path), None), damage):
        count += 1
        lacking = [
            part
            for part, names in (("picture", PICTURES), ("caption", ("txt",)))
            if not any(sample.get(name, b"").strip() for name in names)
        ]
        if lacking:
            incomplete.append((f"{path.name}:{sample['__key__']}", f"no {' and no '.join(lacking)}"))
    if damage.bad or count != expected:
        raise ValueError(
            f"{path} holds {count} samples, img2dataset says {expected}{'; ' + damage.last if damage.bad else ''}; "
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
    jobs = {tar.name: expected_samples(tar) for tar in tars}
    plan = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    total = sum(jobs.values())
    return _pack(folder, jobs, verify_download, plan, total, max_rejected, workers, source=source, **facts)


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
    """Run the command line; 0: done, 1: a ValueError, printed as one message, 2: wrong usage (SystemExit)."""
    args = _parser().parse_args(argv)
    facts = {"variant": args.variant} if args.variant else {}
    options = {"source": args.source or str(args.input), "max_rejected": args.max_rejected, "workers": args.workers}
    try:
        if args.kind == "img2dataset":
            out, manifest = args.input, verify_downloads(args.input, **options, **facts)
        else:
            out = args.out
            if args.kind == "folder":
                root, rows = args.input, read_folder(args.input, args.captions)
            else:
                root = args.root or args.input.parent
                rows = read_table(args.input, args.path_column, args.caption_column, args.label_column)
            manifest = pack_rows(rows, root, out, samples_per_shard=args.samples_per_shard, **options, **facts)
    except ValueError as error:
        print(f"write_shards: error: {error}", file=sys.stderr)
        return 1
    names = list(manifest["shards"])
    print(f"{out}: {manifest['samples']} samples in {len(names)} shards, {names[0]} to {names[-1]}")
    print(f"left out or incomplete: {manifest['rejected']} ({out / REJECTED})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

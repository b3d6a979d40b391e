"""Text files, JSON files and tables of a user: read as UTF-8, or refused with file, line and mend."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Line(NamedTuple):
    """A row of a table. number: its line in the file, or its place in a Parquet table, from 1."""

    number: int
    cells: dict[str, Any]


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. ValueError: it is of another encoding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _other_encoding(file) from error


def _other_encoding(file: Path) -> ValueError:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f"line {number} is not UTF-8 ({error.reason})"
                return ValueError(f"{file} cannot be read: {place}; save it as UTF-8")
    return ValueError(f"{file} cannot be read: it is not UTF-8; save it as UTF-8")


def read_json(file: Path, kind: type | None = None, wanted: str = "JSON") -> Any:
    """The value of a JSON file. ValueError: no JSON, or not of ``kind``; ``wanted`` says what it should be."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except ValueError as error:
        begins = f"; it begins with {text[:20]!r}" if text.strip() else "; it is empty"
        raise ValueError(f"{file} is not JSON ({error}){begins}; it should be {wanted}: get it again") from error
    if kind is not None and not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{file} holds {names.get(type(value), repr(value)[:20])}; it should be {wanted}")
    return value


def read_table(file: Path, columns: Sequence[str] = ()) -> Iterator[Line]:
    """The rows of a .csv, .tsv or .parquet file, its columns named in the first line.

    A .csv may quote its cells; a .tsv has one line per row, and its quotes are characters. Cells are stripped.
    columns: those that must be there (default: all are read).
    ValueError: another kind of file, a missing column, or a row that does not fit the header.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(file, columns)
        return
    if suffix not in SEPARATORS:
        raise ValueError(f"{file} is not a .csv, .tsv or .parquet file")
    quoting = csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines, delimiter=SEPARATORS[suffix], quoting=quoting, strict=True)
            header = [name.strip() for name in next(rows, [])]
            check_columns(file, columns, header)
            number = rows.line_num + 1
            for row in rows:
                if any(cell.strip() for cell in row):
                    _check_width(file, number, row, header)
                    yield Line(number, dict(zip(header, map(str.strip, row), strict=True)))
                number = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read: line {rows.line_num}: {error}; mend its quotes") from error
    except UnicodeDecodeError as error:
        raise _other_encoding(file) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _check_width(file: Path, line: int, row: list[str], header: list[str]) -> None:
    if len(row) == len(header):
        return
    csv_file = file.suffix.lower() == ".csv"
    mend = "quote cells with commas in them" if csv_file else "write one row a line, without quotes"
    raise ValueError(f"line {line} of {file} has {len(row)} cells, its header {len(header)} ({header}); {mend}")


def check_columns(file: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    """ValueError: a wanted column is missing or stands there twice."""
    missing = [name for name in wanted if there.count(name) != 1]
    if missing:
        fault = "two columns" if missing[0] in there else "no column"
        raise ValueError(f"{file} has {fault} {missing[0]!r}; it has {list(there)}; name it with --*-column")


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[Line]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"reading {file} needs pyarrow: pip install '.[data]' in the checkout") from error
    try:
        check_columns(file, columns, parquet.read_schema(file).names)
        table = parquet.read_table(file, columns=list(columns) or None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    names = table.column_names
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    yield from (Line(number, dict(zip(names, row, strict=True))) for number, row in enumerate(rows, 1))


def text_cell(file: Path, line: Line, column: str) -> str:
    """A cell as text, empty where it has no value. ValueError: it is a list, a struct or another kind of value."""
    value = line.cells[column]
    if value is None or value != value:  # NaN is how pandas writes a missing text
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"row {line.number} of {file}: {column!r} is not UTF-8 text ({error.reason})") from error
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):
        hint = "a picture inside the table; write the pictures into files and give their paths"
    elif isinstance(value, list):
        hint = "a list; give each value a row of its own (pandas: DataFrame.explode)"
    else:
        hint = f"a value of type {type(value).__name__}; write it as text"
    raise ValueError(f"row {line.number} of {file}: {column!r} holds {hint}")

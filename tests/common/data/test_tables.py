"""Tables and text files as people write them: read whole, or refused with file, line and mend."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from common.data.tables import read_json, read_table, read_text, text_cell


def rows(file, content, *columns):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(line.cells.values()) for line in read_table(file, columns)]


def test_a_mark_at_the_beginning_is_no_part_of_the_header(tmp_path):
    for name, content in (
        ("a.csv", "path,caption\na,b\n"),
        ("a.tsv", "path\tcaption\r\na\tb\r\n"),
        ("a.CSV", "path,caption\na,b"),
    ):
        assert rows(tmp_path / name, b"\xef\xbb\xbf" + content.encode(), "path", "caption") == [("a", "b")]


def test_quotes_in_a_tsv_are_characters(tmp_path):
    table = 'path\tcaption\n1\t"the best" dog\n2\t"unclosed\n3\t5" pipe\n'
    assert rows(tmp_path / "a.tsv", table) == [("1", '"the best" dog'), ("2", '"unclosed'), ("3", '5" pipe')]


def test_quoted_cells_of_a_csv_may_hold_commas_and_lines(tmp_path):
    assert rows(tmp_path / "a.csv", 'path,caption\n1,"a, b\nc"\n\n2,d\n') == [("1", "a, b\nc"), ("2", "d")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "path,caption\n1,a\n2,b, c\n",
            r"line 3 of .*a\.csv has 3 cells, its header 2 .* quote cells with commas",
        ),
        ("a.tsv", "path\tcaption\n1\n", r"line 2 of .*a\.tsv has 1 cells"),
        ("a.csv", 'path,caption\n1,"a" b\n', r"line 2: .* mend its quotes"),
        ("a.csv", 'path,caption\n1,"a\n2,b\n', r"unexpected end of data"),
        (
            "a.csv",
            "path,caption\n1,a\n2,café\n".encode("latin-1"),
            r"a\.csv cannot be read: line 3 is not UTF-8 .* save it as UTF-8",
        ),
        ("a.tsv", "path\tcaption\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.csv", "path;caption\n", r"no column 'path'; it has \['path;caption'\]"),
        ("a.csv", "path,caption,path\n", "two columns 'path'"),
        ("a.xls", "path", "is not a .csv, .tsv or .parquet file"),
    ],
)
def test_tables_that_cannot_be_read_say_where(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name, content, "path", "caption")


def test_cells_of_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    columns = {"text": ["a", None], "bytes": [b"a", b"b"], "number": [float("nan"), 2.0], "list": [["a"], []]}
    parquet.write_table(pyarrow.table({**columns, "image": [{"bytes": b"x", "path": "p"}] * 2}), file)
    first, second = read_table(file)
    assert text_cell(file, first, "text") == text_cell(file, first, "bytes") == "a"
    assert text_cell(file, second, "text") == text_cell(file, first, "number") == ""
    for column, message in (
        ("number", "type float; write it as text"),
        ("list", "explode"),
        ("image", "a picture inside"),
    ):
        with pytest.raises(ValueError, match=f"row 2 of .*a.parquet: '{column}' holds .*{message}"):
            text_cell(file, second, column)


def test_json_that_is_something_else(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(file, dict) == {"a": 1}
    for content, message in (
        ("", "it is empty"),
        ("<!DOCTYPE html>", "begins with '<!DOCTYPE"),
        ("[1]", "holds a list; it should be facts"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(file, dict, "facts")


def test_text_of_another_encoding(tmp_path):
    (tmp_path / "names.txt").write_bytes("cat\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt cannot be read: line 2 is not UTF-8"):
        read_text(tmp_path / "names.txt")

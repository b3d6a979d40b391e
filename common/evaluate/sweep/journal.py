"""The points of a sweep that are measured, one a line of a file, so that an interrupted sweep goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.evaluate.points import Point
from common.settings import differences

Record = dict[str, Any]
"""What was measured at a point on a split; see ``common.evaluate.sweep.measure.Measure``."""


class Journal:
    """A file of one header and one line for each point and split; a line is written whole, or not at all.

    It begins with the first record; a header alone is that of any sweep.

    identity: all that the numbers depend on beside the point: model, data, prompts, precision, machine.
    ValueError: the file is that of another sweep, and in what it differs, or no journal.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self.file, self.records = file, dict[tuple[str, Point], Record]()
        self.identity = json.loads(json.dumps(identity))
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or not (lines := self._whole_lines()):
            return
        try:
            header, *records = map(json.loads, lines)
            changed = differences(header["sweep"], self.identity)
            for record in records:
                self.records[record["split"], _point(record["point"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no journal of a sweep ({error}); name another folder by --out") from error
        if changed and records:
            raise ValueError(
                f"{file.parent} holds another sweep: {'; '.join(changed)}; name another folder by --out, or delete it"
            )

    def add(self, split: str, point: Point, measured: Record) -> Record:
        """Write a record down, and return it."""
        record = json.loads(json.dumps({"split": split, "point": asdict(point), **measured}))
        if not self.records:  # a sweep that is refused before leaves nothing that would refuse the next one
            self._append({"sweep": self.identity}, "w")
        self._append(record, "a")
        self.records[split, point] = record
        return record

    def of(self, split: str) -> dict[Point, Record]:
        """The records of a split, in the order in which they were measured."""
        return {point: record for (name, point), record in self.records.items() if name == split}

    def _append(self, content: Record, mode: str) -> None:
        with open(self.file, mode, encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[str]:
        """The lines of the file. A last one without an end, which an interruption cut short, is removed."""
        text = self.file.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        if torn:
            self.file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        return whole.split("\n") if whole else []  # a name may hold other characters that end a line


def _point(fields: Mapping[str, Any]) -> Point:
    return Point(**{**fields, "places": tuple(fields["places"])})

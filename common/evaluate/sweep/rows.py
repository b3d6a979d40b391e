"""The records of a sweep as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.evaluate.accuracy import paired_difference
from common.evaluate.points import Point
from common.evaluate.sweep.journal import Record
from common.evaluate.sweep.measure import WHOLE
from common.evaluate.sweep.pictures import unpacked
from common.evaluate.sweep.scoring import Scoring

Row = dict[str, Any]
"""A flat row: plain values under the names of the CSV file's columns."""


def rows(records: Mapping[Point, Record], scoring: type[Scoring]) -> list[Row]:
    """A row for every measured point, with its difference from the whole model, and one for each reducer that failed.

    The main metric of ``scoring`` has its column, and "low" and "high", its interval's ends.
    "difference", "difference_low", "difference_high": the main metric less that of the whole model on the same
    pictures, with a paired 95 % bootstrap interval (fractions).  "of_whole": its share of the whole model's GMACs.
    "reason": why a reducer did not run at these keep rates; such rows hold nothing else, and come last.
    """
    whole = records[WHOLE]
    correct = unpacked(whole["correct"], whole["samples"])
    measured = [
        _row(point, record, whole, correct, scoring) for point, record in records.items() if "reason" not in record
    ]
    return measured + _failures(records)


def _row(point: Point, record: Record, whole: Record, correct: Any, scoring: type[Scoring]) -> Row:
    ours = unpacked(record["correct"], record["samples"])
    difference = (None,) * 3 if point == WHOLE else paired_difference(ours, correct)
    costs = record["gmacs"], whole["gmacs"]
    return {
        **_named(point),
        "samples": record["samples"],
        scoring.column: record[scoring.column],
        "low": record["interval"][0],
        "high": record["interval"][1],
        **dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True)),
        **{name: record[name] for name in scoring.others},
        "gmacs": record["gmacs"],
        "gmacs_paper": record["gmacs_paper"],
        "of_whole": None if None in costs else costs[0] / costs[1],
        **{f"{name}_batch_{batch}": value for batch, speed in record["speed"].items() for name, value in speed.items()},
        "memory_mb": record["memory_mb"],
        "reason": record.get("uncounted"),
    }


def _named(point: Point) -> Row:
    place = "+".join(map(str, point.places)) or None
    own = "own" if (point.keep, point.threshold) != (None, None) else "whole model"
    return {
        "reducer": point.reducer or own,
        "keep": point.keep,
        "place": place,
        "threshold": point.threshold,
    }


def _failures(records: Mapping[Point, Record]) -> list[Row]:
    """One row for each reducer and place, with the keep rates that failed and the reason of the first."""
    failed: dict[tuple[str, str | None], Row] = {}
    for point, record in records.items():
        if "reason" not in record:
            continue
        named = _named(point)
        row = failed.setdefault((named["reducer"], named["place"]), {**named, "keep": [], "reason": record["reason"]})
        row["keep"].append(point.keep)
    return list(failed.values())

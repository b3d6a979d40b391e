"""Tables and their cells: percentages, differences, intervals, and a paper's number beside ours.

Shapes: S seeds, M images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.statistics import share_interval

Result = dict[str, Any]
"""The result of a benchmark: plain values, as its JSON file holds them."""
ELSEWHERE = ("UniCLIP",)
"""Methods in the papers' tables that are not part of this suite."""
_FORMATS = {
    "GMACs": "{:.2f}",
    "tokens": "{:g}",
    "%": "{:.1f}",
    "points": "{:+.1f}",
    "times": "{:.2f}",
    "GPU hours": "{:g}",
    "% a GMAC": "{:.2f}",
    "% an hour": "{:.2f}",
}
"""The format of a number, by its unit."""


class Comparison(NamedTuple):
    """A number that a paper prints, and ours.

    what: begins with the method, if there is one.  ours: None: it was not run.
    unit: one of ``_FORMATS``; "points" are of 1 %, "times" is a ratio.
    same: whether both measure the same thing. A number of the embedded benchmark shows only a direction, so no
        difference from the paper's is taken.
    """

    what: str
    paper: float
    ours: float | None
    unit: str
    same: bool = True

    @property
    def elsewhere(self) -> bool:
        """Whether its method is not part of this suite."""
        return self.what.startswith(ELSEWHERE)

    def cells(self) -> list[str]:
        """What is compared, the paper's number, ours, and the difference, as text."""
        as_text = _FORMATS[self.unit].format
        missing = "not part of this suite" if self.elsewhere else "not run"
        ours = missing if self.ours is None else as_text(round(self.ours, 2))
        return [f"{self.what}, {self.unit}", as_text(self.paper), ours, self._difference()]

    def _difference(self) -> str:
        if self.ours is None:
            return "–"
        if not self.same:
            return "other scale"
        if self.unit in ("GMACs", "tokens"):
            return f"{round(100 * (self.ours / self.paper - 1), 1) + 0.0:+.1f} %"
        return f"{self.ours - self.paper:+.1f}"


def missing_runs(rows: Iterable[tuple[str, int, int]], command: str) -> Iterator[tuple[str, str]]:
    """The missing runs of rows (name, finished runs, planned runs), grouped by their number, with their command."""
    missing: dict[tuple[int, int], list[str]] = {}
    for name, finished, planned in rows:
        if finished < planned:
            missing.setdefault((planned - finished, planned), []).append(name)
    for (count, planned), names in missing.items():
        yield f"{count} of {planned} runs are missing: {'; '.join(dict.fromkeys(names))}", command


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """A Markdown table. left: the columns of text, counted from 0; the others are aligned to the right."""
    rule = ["---" if column in left else "---:" for column in range(len(head))]
    return "\n".join([_line(head), f"|{'|'.join(rule)}|", *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return f"|{'|'.join(' ' if cell == '' else f' {cell} ' for cell in cells)}|"


def number(value: float | None, form: str = ".1f") -> str:
    """One of our numbers in a format; "not run" for None."""
    return "not run" if value is None else format(value, form)


def mean(values: Collection[float]) -> float | None:
    """The mean; None for no values."""
    return fmean(values) if values else None


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of fractions, in %; a single fraction alone."""
    text = f"{100 * fmean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def accuracy_of(correct: Tensor) -> dict[str, Any]:
    """Accuracy over M images with its 95 % interval over them: {"accuracy", "interval"}. correct: bool [M]."""
    right = int(correct.sum())
    return {"accuracy": right / len(correct), "interval": share_interval(right, len(correct))}


def accuracy(fraction: float, interval: Sequence[float]) -> str:
    """A fraction with its interval (low, high), in %."""
    low, high = interval
    return f"{100 * fraction:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def points(difference: Sequence[float] | None, decimals: int = 1) -> str:
    """A difference of fractions (mean, low, high) in points of 1 %; a dash for None."""
    if difference is None:
        return "–"
    middle, low, high = (f"{100 * value:+.{decimals}f}" for value in difference)
    return f"{middle} [{low}, {high}]"


def p_value(p: float) -> str:
    """A p-value; one that would read 0 says below what it is."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def saved(cost: float, dense: float) -> str:
    """The saving of a cost against the dense one, in %."""
    return f"{100 * (1 - cost / dense):.1f} %"

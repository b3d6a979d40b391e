"""What a stored result lacks, and the commands that would make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.page.comparisons import ELSEWHERE, Comparison

Result = dict[str, Any]
PATCHRANK_SEEDS = 3
"""Trainings of each of Patch Ranking's rows, but for those that are not trained."""
UNTRAINED = ("all tokens", "class attention", "random", "EViT", "ToMe", "golden ranking")
AT_96 = ("make retrain ONLY=teacher-96", "make retrain ONLY=waveclip-96")
"""What trains the models that WaveCLIP's embedded part at 96 px needs."""


def of_the_paper(compared: Sequence[Comparison], recipe: str) -> Iterator[tuple[str, str | None]]:
    """Printed numbers that the paper's own data and size would give, and those of methods that are not here.

    recipe: the command that makes the former. Embedded numbers are not among them, see ``untrained``.
    """
    missing = [each for each in compared if each.ours is None and each.same]
    foreign = [each for each in missing if each.elsewhere]
    if len(missing) > len(foreign):
        yield f"{len(missing) - len(foreign)} of its numbers need the paper's data and size", recipe
    if foreign:
        methods = ", ".join(name for name in ELSEWHERE if any(each.what.startswith(name) for each in foreign))
        yield f"{len(foreign)} of its numbers are of methods that are not part of this suite: {methods}", None


def untrained(name: str, result: Result, train: str) -> Iterator[tuple[str, str]]:
    """Embedded models that a benchmark's result is to hold and does not. train: the command that makes its runs."""
    lacking: dict[tuple[int, int], list[str]] = {}
    for row, seeds, planned in _RUNS[name](result) if name in _RUNS else ():
        if seeds < planned:
            lacking.setdefault((planned - seeds, planned), []).append(row)
    for (count, planned), rows in lacking.items():
        yield f"{count} of {planned} runs are missing: {'; '.join(dict.fromkeys(rows))}", train
    if name == "waveclip-highres" and result["embedded"] is None:
        yield "the embedded models of 96 px", " && ".join(AT_96)
    if name == "frontier":
        yield from ((f"{method} was not trained", how) for method, how in result["missing"].items())


def _ablation(result: Result) -> Iterator[tuple[str, int, int]]:
    for row in result["rows"]:
        if row["run"]:
            yield row["method"], len(row["seeds"]), len(result["planned"])


def _times(result: Result) -> Iterator[tuple[str, int, int]]:
    for row in result["rows"]:
        yield row["run"], len(row["seeds"]), result["planned"]


def _table(result: Result) -> Iterator[tuple[str, int, int]]:
    """Patch Ranking's; a row's tasks have as many seeds as the one that has the fewest."""
    for row in result["rows"]:
        seeds = min(map(len, row["accuracy"].values()), default=0)
        yield row["row"], seeds, 1 if row["row"] in UNTRAINED else PATCHRANK_SEEDS


def _curves(result: Result) -> Iterator[tuple[str, int, int]]:
    """Its Figure 1's, a curve once for every task; at keep 100 % an untuned one is the dense model."""
    for row in result["rows"]:
        seeds = min((len(point["accuracy"]) for point in row["points"] if point["keep"] < 1), default=0)
        yield row["curve"], seeds, 1 if row["curve"] in UNTRAINED else PATCHRANK_SEEDS


def _first(result: Result) -> Iterator[tuple[str, int, int]]:
    """Its Figure 5's."""
    yield "predictor before the first block", result["conditions"]["seeds"], PATCHRANK_SEEDS


_RUNS: dict[str, Callable[[Result], Iterator[tuple[str, int, int]]]] = {
    **{f"mlip-table{number}": _ablation for number in (3, 5, 6, 7, 8)},
    "mlip-table10": _times,
    "patchrank-table1": _table,
    "patchrank-fig1": _curves,
    "patchrank-fig5": _first,
}
"""A result's rows, how many runs each has, and how many are planned."""

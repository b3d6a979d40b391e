"""Every reducer at equal multiply-adds, from the sweeps in ``benchmarks/results/sweeps``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks import RESULTS
from benchmarks.cells import points, table
from common.reducer_registry import installed_reducers

SWEEPS = {"shapes": "scenes of shape", "cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
"""The folders of the sweeps, and what tables call their data."""
SHARES = (0.75, 0.6)
"""Shares of the whole tower's multiply-adds."""
WHOLE = "whole model"
Row = Mapping[str, Any]


def at_equal_cost() -> str:
    """A table with a line for each reducer that reaches SHARES of the multiply-adds anywhere: what it loses there.

    The order is that of the mean at the first share, over the data where it is reached.
    """
    sweeps = {name: json.loads((RESULTS / "sweeps" / name / "sweep.json").read_text()) for name in SWEEPS}
    reducers = sorted({row["reducer"] for sweep in sweeps.values() for row in sweep["rows"]} - {WHOLE})
    lost = {
        reducer: {
            (share, name): interpolated([row for row in sweep["rows"] if row["reducer"] == reducer], share)
            for share in SHARES
            for name, sweep in sweeps.items()
        }
        for reducer in reducers
    }
    titles = installed_reducers()
    lines = [
        [titles[reducer].title, *("–" if found is None else points(found) for found in lost[reducer].values())]
        for reducer in sorted(reducers, key=lambda reducer: _rank(lost[reducer]), reverse=True)
        if any(lost[reducer].values())
    ]
    head = [f"{title}, {100 * share:.0f} % of GMACs" for share in SHARES for title in SWEEPS.values()]
    return f"{table(['reducer', *head], lines)}\n\n{_note(sweeps)}\n"


def interpolated(rows: Sequence[Row], share: float) -> tuple[float, float, float] | None:
    """A reducer's accuracy less the whole tower's at a share of its multiply-adds, with the interval's ends.

    It lies on the line between the two neighbours in cost. None: all that was measured costs more, or all less.
    """
    by_cost = {row["of_whole"]: row for row in rows if row["reason"] is None}
    for less, more in pairwise(sorted(by_cost)):
        if less <= share <= more:
            weight = (share - less) / (more - less)
            ends = ("difference", "difference_low", "difference_high")
            return tuple((1 - weight) * by_cost[less][end] + weight * by_cost[more][end] for end in ends)
    return None


def _rank(lost: Mapping[tuple[float, str], Sequence[float] | None]) -> float:
    """The mean loss at the first share; a reducer that reaches it nowhere comes last."""
    found = [each[0] for name in SWEEPS if (each := lost[SHARES[0], name])]
    return fmean(found) if found else -1.0


def _note(sweeps: Mapping[str, Mapping[str, Any]]) -> str:
    whole = {name: next(row for row in sweep["rows"] if row["reducer"] == WHOLE) for name, sweep in sweeps.items()}
    names = ", ".join(
        f"{title} {100 * whole[name]['top1']:.1f} % ({whole[name]['samples']:,} pictures)"
        for name, title in SWEEPS.items()
    )
    return (
        "Top-1 less that of the whole tower, in points, at shares of its multiply-adds (attention on both sides, the "
        "reducer's own work with it). Values and ends of the 95 % intervals, over pictures and paired with the whole "
        "tower, are interpolated linearly between two keep rates; such an interval is never too narrow. One tower a "
        "data set. No setting was tuned for this; token correlation's cosine of 0.9 is the best of four on this val of "
        "scenes of shape (docs/reducers.md), so its line there may be flattered. The whole towers name: "
        f"{names}. Scenes of shape and CIFAR-10: val; "
        "Fashion-MNIST has none, and its test was read twice for this. –: no keep rate of the sweep costs so little, "
        "or so much. Trained reducers stand in "
        "[Patch Ranking's table](patchrank.md#the-table)."
    )

"""Settings of the frontier's methods: chosen on ``val`` within budgets of multiply-adds, and compared on ``test``.

Shapes: M pictures, S training seeds of a method, L steps of a model (1 without early exit, else 2).

All seeds of a method have one setting: a keep rate, and the share of val's pictures that goes on to the second step.
The threshold that gives this share is each seed's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.statistics import difference, holm, mean_interval
from benchmarks.together.compositions import Family
from benchmarks.waveclip.controls import LATER_WAVE, WAVE
from benchmarks.waveclip.exits import refined_by_share
from benchmarks.waveclip.saving import SHARES, Exits

Key = tuple[str, float | None]
"""A method's name and a keep rate."""
BySeed = Sequence[Exits] | Sequence[np.ndarray]
"""The answers of a model with early exit, or which ones are right, bool [M], of one without; an entry a seed."""
Costs = Mapping[Key, Sequence[float]]
"""GMACs of one picture that leaves at each step [L]."""


@dataclass(frozen=True)
class Setting:
    """A method's setting, with accuracy and GMACs on ``val``, means of its seeds. share: None without early exit."""

    method: str
    keep: float | None
    share: float | None
    accuracy: float
    gmacs: float

    @property
    def key(self) -> Key:
        """The method and its keep rate."""
        return self.method, self.keep


@dataclass(frozen=True)
class Outcome:
    """What a setting comes to on a split.

    correct: bool [S,M].  gmacs: of a picture, mean of the seeds.  refined: the share of pictures that went on to the
    second step.  thresholds: of each seed; None, as ``refined``, without early exit.
    """

    correct: np.ndarray
    gmacs: float
    refined: float | None = None
    thresholds: Sequence[float] | None = None


def outcome(val: BySeed, seen: BySeed, costs: Sequence[float], share: float | None) -> Outcome:
    """What a model answers in ``seen`` where each seed refines ``share`` of its pictures of ``val``."""
    if share is None:
        return Outcome(np.stack(seen), costs[0])
    first, second = costs
    point = refined_by_share(val, seen, share)
    return Outcome(point.correct, first + point.share * (second - first), point.share, point.thresholds)


def settings(method: Family, val: Mapping[Key, BySeed], costs: Costs) -> list[Setting]:
    """Every setting of a method on ``val``, with shares in steps of 1 %.

    A composition refines 1 % at least: where it refines nothing it is WaveCLIP itself.
    """
    result = []
    for keep in method.models:
        key = method.name, keep
        early = len(costs[key]) > 1
        shares = (SHARES[1:] if method.composed else SHARES).tolist() if early else [None]
        for share in shares:
            reached = outcome(val[key], val[key], costs[key], share)
            result.append(Setting(*key, share, float(reached.correct.mean()), reached.gmacs))
    return result


def best_within(settings: Sequence[Setting], budget: float) -> Setting | None:
    """The setting of the highest accuracy within ``budget`` GMACs, the cheapest of equals; None: all cost more."""
    within = [setting for setting in settings if setting.gmacs <= budget * (1 + 1e-9)]
    return max(within, key=lambda setting: (setting.accuracy, -setting.gmacs), default=None)


def operating_points(settings: Sequence[Setting], budgets: Sequence[float]) -> list[Setting]:
    """The best settings within each budget, each once, cheapest first; the only one of a method without settings."""
    if [(setting.keep, setting.share) for setting in settings] == [(None, None)]:
        return list(settings)
    best = (best_within(settings, budget) for budget in budgets)
    return sorted({setting for setting in best if setting is not None}, key=lambda setting: setting.gmacs)


def table_row(method: Family, setting: Setting, reached: Outcome) -> dict[str, Any]:
    """A setting with its numbers on ``test``."""
    middle, low, high = mean_interval(reached.correct).ends
    return {
        "method": method.name,
        "composed": method.composed,
        "seeds": len(method.all_seeds),
        "keep": setting.keep,
        "share": setting.share,
        "thresholds": reached.thresholds,
        "refined": reached.refined,
        "gmacs": reached.gmacs,
        "val": {"accuracy": setting.accuracy, "gmacs": setting.gmacs},
        "accuracy": middle,
        "interval": [low, high],
        "rival": None,
    }


def set_against_rivals(
    rows: Sequence[dict[str, Any]],
    methods: Sequence[Family],
    known: Mapping[str, Sequence[Setting]],
    val: Mapping[Key, BySeed],
    test: Mapping[Key, BySeed],
    costs: Costs,
) -> None:
    """Give WaveCLIP's rows and every composed one their rival: the best other method alone that costs no more on val.

    known: the settings of each method. A rival with early exit may take any share, so that a composition gains nothing
    by falling between two budgets; the others take the settings that were evaluated on ``test``. The WaveCLIP from the
    teacher trained on is no rival, as it had half as many steps again as all others have at most. The difference on
    ``test`` is paired by picture, and by seed where both have the same ones; ``p`` is Holm's over all rows. A row has
    no rival where nothing else is as cheap.
    """
    by_name = {method.name: method for method in methods}
    rivals = [method for method in methods if not method.composed and method.name != LATER_WAVE]
    alone = [s for method in rivals for s in known[method.name] if s.key in test]
    p_values: dict[str, float] = {}
    for number, row in enumerate(rows):
        if not row["composed"] and row["method"] != WAVE:
            continue
        rival = best_within([s for s in alone if s.method != row["method"]], row["val"]["gmacs"])
        if rival is None:
            continue
        key = row["method"], row["keep"]
        ours = outcome(val[key], test[key], costs[key], row["share"])
        theirs = outcome(val[rival.key], test[rival.key], costs[rival.key], rival.share)
        paired = by_name[row["method"]].all_seeds == by_name[rival.method].all_seeds
        gap = difference(ours.correct, theirs.correct, paired)
        row["rival"] = {"method": rival.method, "keep": rival.keep, "difference": list(gap.ends)}
        p_values[str(number)] = gap.p
    for number, p in holm(p_values).items():
        rows[int(number)]["rival"]["p"] = p


def mark_dominated(rows: Collection[dict[str, Any]]) -> None:
    """For each row, list the costs ("gmacs", "seconds") in which another row dominates it."""
    for row in rows:
        row["dominated"] = [
            cost
            for cost in ("gmacs", "seconds")
            if any(
                other[cost] <= row[cost]
                and other["accuracy"] >= row["accuracy"]
                and (other[cost], other["accuracy"]) != (row[cost], row["accuracy"])
                for other in rows
            )
        ]

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

from benchmarks.statistics import Interval, adjusted_p, difference, mean_interval
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


def table_row(
    method: Family, setting: Setting, val: Mapping[Key, BySeed], test: Mapping[Key, BySeed], costs: Costs
) -> dict[str, Any]:
    """A setting with its numbers on ``test``; under "of_models" those of the seeds whose models are here."""
    key = setting.key
    reached = outcome(val[key], test[key], costs[key], setting.share)
    here = len(method.seeds)
    of_models = outcome(val[key][:here], test[key][:here], costs[key], setting.share)
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
        "of_models": {"accuracy": float(of_models.correct.mean()), "gmacs": of_models.gmacs},
        "rival": None,
        "best": None,
    }


def compare_rows(
    rows: Sequence[dict[str, Any]],
    methods: Sequence[Family],
    val: Mapping[Key, BySeed],
    test: Mapping[Key, BySeed],
    costs: Costs,
    limits: Sequence[float],
) -> None:
    """Give rows under "rival" and "best" what they are compared with, the difference on ``test``, and its p.

    See ``set_against_rivals`` and ``set_against_best``; differences are paired by picture, and by seed where both have
    the same ones. p is adjusted over all of them.
    """
    of_rivals = set_against_rivals(rows, methods, val, test, costs)
    gaps = {(number, "rival"): gap for number, gap in of_rivals.items()}
    of_best = set_against_best(rows, methods, val, test, costs, limits)
    gaps |= {(number, "best"): gap for number, gap in of_best.items()}
    for (number, what), p in adjusted_p(gaps).items():
        rows[number][what]["p"] = p


def set_against_rivals(
    rows: Sequence[dict[str, Any]],
    methods: Sequence[Family],
    val: Mapping[Key, BySeed],
    test: Mapping[Key, BySeed],
    costs: Costs,
) -> dict[int, Interval]:
    """Give WaveCLIP's rows and every composed one their rival: the best other method alone that costs no more on val.

    A rival with early exit may take any share, so that a composition gains nothing by falling between two budgets; the
    others take the settings that were evaluated on ``test``. The WaveCLIP from the teacher trained on is no rival: it
    had half as many steps again as all others have at most. A composition has the seeds whose models are here, and its
    rivals are seen by these alone, so that none gains by luckier trainings. A row has no rival where nothing else is as
    cheap. Returns the differences by the rows' numbers.
    """
    rivals = [method for method in methods if not method.composed and method.name != LATER_WAVE]
    gaps = {}
    for composed in (False, True):
        on_val, on_test = (of_models(methods, seen) if composed else seen for seen in (val, test))
        alone = [setting for method in rivals for setting in settings(method, on_val, costs) if setting.key in test]
        seeds = {method.name: method.seeds if composed else method.all_seeds for method in methods}
        for number, row in enumerate(rows):
            if row["composed"] != composed or not (composed or row["method"] == WAVE):
                continue
            rival = best_within([s for s in alone if s.method != row["method"]], row["val"]["gmacs"])
            if rival is None:
                continue
            ours, theirs = (
                outcome(on_val[key], on_test[key], costs[key], share).correct
                for key, share in (((row["method"], row["keep"]), row["share"]), (rival.key, rival.share))
            )
            gaps[number] = difference(ours, theirs, seeds[row["method"]] == seeds[rival.method])
            row["rival"] = _against(rival, gaps[number])
    return gaps


def set_against_best(
    rows: Sequence[dict[str, Any]],
    methods: Sequence[Family],
    val: Mapping[Key, BySeed],
    test: Mapping[Key, BySeed],
    costs: Costs,
    limits: Sequence[float],
) -> dict[int, Interval]:
    """Give each reducer's row, and each of the rank predictor, the reducer that is the best on val within its budget.

    A row's budget is the least of ``limits``, in GMACs, that it keeps. The best itself has none to be compared with.
    Returns the differences by the rows' numbers.
    """
    seeds = {method.name: method.seeds for method in methods}
    reducers = [method for method in methods if method.reducer and not method.composed]
    alone = [setting for method in reducers for setting in settings(method, val, costs) if setting.key in test]
    gaps = {}
    for number, row in enumerate(rows):
        if row["composed"] or row["keep"] is None:
            continue
        best = best_within(alone, min(limit for limit in limits if row["gmacs"] <= limit * (1 + 1e-9)))
        if best.key != (row["method"], row["keep"]):
            gaps[number] = difference(
                test[row["method"], row["keep"]], test[best.key], seeds[row["method"]] == seeds[best.method]
            )
            row["best"] = _against(best, gaps[number])
    return gaps


def _against(setting: Setting, gap: Interval) -> dict[str, Any]:
    """What a row says of the setting with which it is compared."""
    return {"method": setting.method, "keep": setting.keep, "difference": list(gap.ends)}


def of_models(methods: Sequence[Family], seen: Mapping[Key, BySeed]) -> dict[Key, BySeed]:
    """The answers of the seeds whose models are here, without those of which only answers are left."""
    seeds = {method.name: len(method.seeds) for method in methods}
    return {key: answers[: seeds[key[0]]] for key, answers in seen.items()}


def mark_dominated(rows: Collection[dict[str, Any]]) -> None:
    """For each row, list the costs ("gmacs", "seconds") in which another row dominates it.

    Beside a composition, a row counts by the seeds whose models are here, as compositions do.
    """
    for row in rows:
        row["dominated"] = [
            cost
            for cost in ("gmacs", "seconds")
            if any(_dominates(*(_seen(each, row, other) for each in (other, row)), cost) for other in rows)
        ]


def _seen(row: dict[str, Any], *pair: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers in the comparison of a pair to which it belongs."""
    return row | row["of_models"] if any(each["composed"] for each in pair) else row


def _dominates(other: dict[str, Any], row: dict[str, Any], cost: str) -> bool:
    ahead = other[cost] <= row[cost] and other["accuracy"] >= row["accuracy"]
    return ahead and (other[cost], other["accuracy"]) != (row[cost], row["accuracy"])

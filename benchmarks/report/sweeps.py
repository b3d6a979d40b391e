"""Which reducer to pick: all of them at equal multiply-adds, in the sweeps and in Patch Ranking's table.

Shapes: M pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks import RESULTS
from benchmarks.cells import points, table
from benchmarks.equal_cost import SWEEPS, At, sweep
from benchmarks.patchrank.comparisons import EQUAL_COST, LEARNED, LEVEL, verdict
from benchmarks.patchrank.tasks import CIFAR, FASHION, SHAPES
from benchmarks.patchrank.trained_rivals import TRAINED_RIVALS
from benchmarks.statistics import Interval, adjusted_p, difference
from common.reducer_registry import installed_reducers

KINDS = (("shapes",), ("cifar10", "fashion-mnist"))
"""Sweeps that share their picks: those of the first one's val."""
COLUMNS = {0.75: KINDS, 0.6: (("shapes",), ("cifar10",))}
"""By share of the whole tower's multiply-adds. In Fashion-MNIST's tower of three blocks no merging costs 60 %."""
CONTROLS = ("centre-crop", "random", "random-per-picture", "half-resolution")
"""Compared with the picks, and never one."""
DROPPING = (
    *("ats", "class-attention", "class-attention-after", "divprune", "globalcom2", "hired", "kmedoids"),
    *("token-correlation", "zoo-prune", *CONTROLS[:3]),
)
"""What only drops tokens, so that none is a mean of several."""
CAVEATS = {("token-correlation", "shapes"): "its cosine was chosen on these pictures"}
"""What flatters a reducer in a sweep."""
TASKS = dict(zip(SWEEPS, (SHAPES.name, CIFAR.name, FASHION.name), strict=True))
"""What Patch Ranking's table calls a sweep's data."""


@dataclass(frozen=True)
class Choice:
    """A pick in one sweep, at one share of the multiply-adds, and how the others differ from it.

    lost: the pick less the whole tower.  gaps: each other reducer that costs as little, less the pick.
    p: of each gap, after Holm's correction over all choices.
    """

    pick: str
    at: At
    lost: Interval
    gaps: Mapping[str, Interval]
    p: Mapping[str, float]

    def word(self, reducer: str) -> str:
        """Whether a reducer is behind the pick or ahead of it, or that neither is shown."""
        if self.p[reducer] >= LEVEL:
            return "not shown"
        return "ahead" if self.gaps[reducer].middle > 0 else "behind"

    def level(self) -> list[str]:
        """The reducers that are not shown to be behind, the best first; without controls."""
        found = [name for name in self.gaps if self.word(name) != "behind" and name not in CONTROLS]
        return sorted(found, key=lambda name: self.gaps[name].middle, reverse=True)


Choices = Mapping[tuple[str, float, bool], Choice]
"""By sweep, share, and whether only what drops is compared."""


def choices() -> Choices:
    """The picks among all reducers, and at the first share among those that only drop.

    A pick is the most accurate one on val of the first sweep of its kind, of the reducers that cost so little in each.
    """
    found, gaps = {}, {}
    questions = [(share, kind, False) for share, kinds in COLUMNS.items() for kind in kinds]
    questions += [(next(iter(COLUMNS)), kind, True) for kind in KINDS]
    for share, kind, dropping in questions:
        at = {name: _reached(name, share, DROPPING if dropping else None) for name in kind}
        everywhere = set.intersection(*(set(each) - set(CONTROLS) for each in at.values()))
        pick = max(sorted(everywhere), key=lambda reducer: at[kind[0]][reducer].right.mean())
        for name in kind:
            key, ours = (name, share, dropping), at[name][pick]
            found[key] = pick, ours, difference(ours.right, sweep(name).whole)
            for reducer in at[name].keys() - {pick}:
                gaps[(*key, reducer)] = difference(at[name][reducer].right, ours.right)
    p = adjusted_p(gaps)
    return {
        key: Choice(*each, *({name: of[*key, name] for *own, name in of if (*own,) == key} for of in (gaps, p)))
        for key, each in found.items()
    }


def _reached(name: str, share: float, among: Sequence[str] | None) -> dict[str, At]:
    """The reducers of a sweep that cost so little, some of them or all."""
    candidates = sorted(sweep(name).measured) if among is None else among
    return {reducer: at for reducer in candidates if (at := sweep(name).at(reducer, share)) is not None}


def picks() -> str:
    """Questions and what the sweeps and Patch Ranking's table answer, a column a data set."""
    found, measured = choices(), json.loads((RESULTS / "patchrank-table1.json").read_text())
    asked = {
        "which reducer, for three quarters of the multiply-adds?": lambda name: _picked(found, name, 0.75),
        "for 60 %?": lambda name: _picked(found, name, 0.6),
        "for three quarters, where tokens can only be dropped?": lambda name: _picked(found, name, 0.75, True),
        "is the learned predictor worth training?": lambda name: _predictor(measured["rivals"], TASKS[name]),
        "does training the tower add to it?": lambda name: _trained(measured["learned"], TASKS[name]),
    }
    lines = [[question, *map(answer, SWEEPS)] for question, answer in asked.items()]
    note = (
        "Brackets: top-1 less the whole tower's in points, with its 95 % interval. The pick is the most accurate "
        "reducer on 5,000 pictures of val, and compared with the others on the same ones: so its own lead is "
        "flattered, and what is near it may look farther behind than it is. The photographs' pick is CIFAR-10's, of "
        "those that reach so low a cost on both sets; Fashion-MNIST's test pictures had no part in the choice. Behind: "
        f"p below .05 after Holm's correction over the {sum(len(each.gaps) for each in found.values())} differences "
        "from the picks. The last two lines are read on test, at equal multiply-adds, with three training seeds: Patch "
        "Ranking against what needs no training; and a trained reducer against a tower that is trained alike with one "
        "that learns nothing, or that tower against the untrained one "
        "([Patch Ranking's tables](patchrank.md#the-table))."
    )
    return f"{table(['question', *SWEEPS.values()], lines, left=range(4))}\n\n{note}\n"


def _picked(found: Choices, name: str, share: float, dropping: bool = False) -> str:
    choice = found.get((name, share, dropping))
    if choice is None:
        return "–"
    chosen = f"**{_title(choice.pick)}**{_caveat(choice.pick, name)}"
    level = [f"{_title(reducer)}{_caveat(reducer, name)}" for reducer in choice.level()]
    chance = [_title(reducer) for reducer in choice.gaps if reducer in CONTROLS and choice.word(reducer) != "behind"]
    said = f"{chosen}, keep {choice.at.keep:.2f} ({points(choice.lost.ends)})"
    said += f"; not shown to be behind: {', '.join(level) or 'none'}"
    return f"{said}; nor is the control {' nor '.join(chance)}" if chance else said


def _predictor(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    """The predictor against all that needs no training, at equal multiply-adds."""
    by_word: dict[str, list[str]] = {"worse": [], "better": [], "not shown": []}
    for row in rows:
        if (row["task"], row["basis"]) == (task, EQUAL_COST) and row["rival"] not in TRAINED_RIVALS:
            lead = f" ({points(row['lead'])})" if verdict(row) == "worse" else ""
            by_word[verdict(row)].append(f"{row['rival']}{lead}")
    word = "no" if by_word["worse"] else "yes" if not by_word["not shown"] else "not shown"
    heads = {"worse": "behind", "better": "ahead of", "not shown": "not told from"}
    said = [f"{heads[each]} {', '.join(names)}" for each, names in by_word.items() if names]
    return f"**{word}**: {'; '.join(said)}" if said else "not run"


def _trained(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    """What training adds, pair by pair."""
    known = {(row["of"], row["rival"]): row for row in rows if row["task"] == task}
    said = [f"{first}: {verdict(known[first, second])}" for first, second in LEARNED if (first, second) in known]
    return "; ".join(said) or "not run"


def at_equal_cost() -> str:
    """A table with a line for each reducer that costs so little anywhere: what it is less than the pick there.

    The order is that of the mean at the first share, over the data where it is reached.
    """
    found = {key: choice for key, choice in choices().items() if not key[2]}
    reducers = {reducer for choice in found.values() for reducer in (choice.pick, *choice.gaps)}
    heads = [f"{SWEEPS[name]}, {100 * share:.0f} % of GMACs" for name, share, _ in found]
    chosen = [f"{_title(each.pick)}, keep {each.at.keep:.2f}: {points(each.lost.ends)}" for each in found.values()]
    lines = [["**the pick**, less the whole tower", *chosen]]
    for reducer in sorted(reducers, key=lambda reducer: _mean_gap(reducer, found), reverse=True):
        lines.append([_labelled(reducer), *(_cell(reducer, choice) for choice in found.values())])
    return f"{table(['reducer, less the pick', *heads], lines)}\n\n{_note(found)}\n"


def _mean_gap(reducer: str, found: Choices) -> float:
    """A reducer's mean difference from the picks at the first share; one that reaches it nowhere comes last."""
    first = [choice for (_, share, _), choice in found.items() if share == next(iter(COLUMNS))]
    gaps = [choice.gaps[reducer].middle for choice in first if reducer in choice.gaps]
    return fmean([*gaps, *(0.0 for choice in first if choice.pick == reducer)] or [-1.0])


def _cell(reducer: str, choice: Choice) -> str:
    if reducer == choice.pick:
        return "**pick**"
    return f"{points(choice.gaps[reducer].ends)} {choice.word(reducer)}" if reducer in choice.gaps else "–"


def _title(reducer: str) -> str:
    return installed_reducers()[reducer].title


def _caveat(reducer: str, name: str) -> str:
    return f" ({CAVEATS[reducer, name]})" if (reducer, name) in CAVEATS else ""


def _labelled(reducer: str) -> str:
    said = [f"{caveat} of {SWEEPS[name]}" for (each, name), caveat in CAVEATS.items() if each == reducer]
    return f"{_title(reducer)} ({'; '.join(said)})" if said else _title(reducer)


def _note(found: Choices) -> str:
    return (
        "Points of top-1 at shares of the whole tower's multiply-adds (attention on both sides, the reducer's own work "
        "with it), with 95 % intervals over pictures, paired. Answers, and the pick's keep rate, are interpolated "
        "linearly between two keep rates. Behind, ahead: p below .05 after Holm's correction over the differences of "
        "this table and those of what only drops. One tower a data set, so nothing is said of other trainings. The "
        f"whole towers name: {', '.join(_wholes())}. Choice and verdict are both on val, of scenes of shape and "
        "CIFAR-10; Fashion-MNIST has no val, its test was read twice for this, and its pick is CIFAR-10's. No setting "
        "was tuned for this; token correlation's cosine of 0.9 is the best of four on this val of scenes of shape "
        "(docs/reducers.md), so its line there is flattered. –: no keep rate of the sweep costs so little, or so much; "
        "on Fashion-MNIST 60 % is left out, which merging never reaches in three blocks."
    )


def _wholes() -> Iterator[str]:
    for name, title in SWEEPS.items():
        whole = sweep(name).whole.double()
        yield f"{title} {100 * whole.mean():.1f} % ({whole.numel():,} pictures)"

"""WaveCLIP beside its controls (benchmarks/protocol.md), over training seeds: accuracies, costs, what early exit saves.

The controls are the teacher trained on for the student's steps, a half-resolution CLIP with the student's total
training, and a cascade of these two that shares nothing.

Shapes: M pictures, S training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.cells import points, table
from benchmarks.statistics import Values, adjusted_p, difference, mean_interval
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.exits import least_confident_refined, refined_by_share
from benchmarks.waveclip.saving import ALLOWANCE, RESAMPLES, Exits, Saving, saving
from common.early_exit import NEVER

TEACHER, TRAINED_ON, HALF = "teacher (dense)", "teacher trained on", "half-resolution CLIP"
WAVE, CASCADE, FINE = "WaveCLIP", "cascade of two CLIPs", "WaveCLIP's fine level"
LATER_WAVE = "WaveCLIP from the teacher trained on"
SAVES = "saves"
"""The verdict on a saving whose interval lies above 0."""
NOT_COMPARABLE = "not comparable: one of them has no threshold at that accuracy"
HEADLINE_SEEDS = 3
"""Training seeds behind a headline."""
CURVE_POINTS, CURVE_RESAMPLES = 21, 1000
"""Shares of refined pictures on a curve, and the resamples behind each one's interval."""
Curve = dict[str, list[float]]
"""A value of "refined", "gmacs", "accuracy" and its interval's ends "low" and "high" for each share."""


@dataclass(frozen=True)
class SeedAnswers:
    """What the models of one training seed answer for M pictures; the reference of both classifiers is the teacher.

    wave: the coarse level, then the fine one.  cascade: the half-resolution CLIP, then the teacher trained on.
    """

    wave: Exits
    cascade: Exits

    def right(self) -> dict[str, np.ndarray]:
        """Which answers of each single model are right, bool [M]."""
        return {
            "teacher": self.wave.reference,
            "coarse": self.wave.first,
            "fine": self.wave.second,
            TRAINED_ON: self.cascade.second,
            HALF: self.cascade.first,
        }


@dataclass(frozen=True)
class Costs:
    """The image towers' costs of one picture: of leaving either classifier at each step, and of the dense teacher."""

    dense: Cost
    wave: Sequence[Cost]
    half: Cost

    def steps(self, classifier: str) -> list[tuple[float, float]]:
        """(tokens, GMACs) of leaving at the first step and at the second."""
        half, dense, *wave = ((cost.tokens, cost.macs.gmacs) for cost in (self.half, self.dense, *self.wave))
        return wave if classifier == WAVE else [half, (half[0] + dense[0], half[1] + dense[1])]


def seed_answers(teacher: Answers, wave: Answers, half: Answers, trained_on: Answers) -> SeedAnswers:
    """Both classifiers of one training seed, on the same pictures."""
    return SeedAnswers(wave.exits(teacher.last), half.cascade(trained_on, teacher.last))


def rows(
    val: Sequence[SeedAnswers], test: Sequence[SeedAnswers], costs: Costs, shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Accuracy and cost on ``test`` of the teacher, of WaveCLIP's operating points, and of the controls.

    val, test: one entry a training seed.  shares: of refined pictures on ``val``, by the operating point's name.
    ``p`` is that of the difference to the teacher after Holm's correction over these rows.
    """
    dense = (costs.dense.tokens, costs.dense.macs.gmacs)
    teacher = [seen.wave.reference for seen in test]
    result = [_row(TEACHER, teacher, dense) | {"refined": None}]
    whole = {"coarse-only": 0.0, **shares, "full": 1.0}
    result += _points(WAVE, [seen.wave for seen in val], [seen.wave for seen in test], costs, whole)
    result.append(_row(TRAINED_ON, [seen.cascade.second for seen in test], dense) | {"refined": None})
    half = costs.steps(CASCADE)[0]
    result.append(_row(HALF, [seen.cascade.first for seen in test], half) | {"refined": None})
    result += _points(CASCADE, [seen.cascade for seen in val], [seen.cascade for seen in test], costs, shares)
    compared = {row["method"]: difference(row.pop("correct"), teacher, paired_seeds=True) for row in result}
    adjusted = adjusted_p({name: interval for name, interval in compared.items() if name != TEACHER})
    for row in result:
        row["against_teacher"], row["p"] = compared[row["method"]].ends, adjusted.get(row["method"])
    return result


def _points(
    name: str, val: Sequence[Exits], test: Sequence[Exits], costs: Costs, shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each share of refined pictures; every seed has the threshold that gives this share on its val."""
    steps, result = costs.steps(name), []
    for point, share in shares.items():
        refined = refined_by_share(val, test, share)
        cost = [first + refined.share * (second - first) for first, second in zip(*steps, strict=True)]
        row = _row(f"{name} {point}", refined.correct, cost)
        result.append(row | {"refined": refined.share, "thresholds": refined.thresholds})
    return result


def _row(method: str, correct: Values, cost: Sequence[float]) -> dict[str, Any]:
    middle, low, high = mean_interval(correct).ends
    tokens, gmacs = cost
    interval = {"accuracy": middle, "interval": [low, high]}
    return {"method": method, "correct": correct, **interval, "tokens": tokens, "gmacs": gmacs}


def savings(
    val: Sequence[SeedAnswers], test: Sequence[SeedAnswers], costs: Costs, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """What WaveCLIP and the cascade save at the accuracy of each reference, and how much more WaveCLIP does.

    The references are the teacher, the teacher trained on and, of WaveCLIP alone, its own fine level.
    """
    result = []
    for reference in ("teacher", TRAINED_ON):
        by_name = {name: _saving(name, reference, val, test, costs, resamples) for name in (WAVE, CASCADE)}
        result += [saving_line(name, reference, value) for name, value in by_name.items()]
        more = by_name[WAVE].less(by_name[CASCADE])
        result.append({"method": f"{WAVE} less {CASCADE}", "reference": reference, "saved": more.ends})
    return [*result, saving_line(WAVE, FINE, _saving(WAVE, "fine", val, test, costs, resamples))]


def _saving(
    name: str, reference: str, val: Sequence[SeedAnswers], test: Sequence[SeedAnswers], costs: Costs, resamples: int
) -> Saving:
    def compared(split: Sequence[SeedAnswers]) -> list[Exits]:
        classifiers = [seen.wave if name == WAVE else seen.cascade for seen in split]
        references = [seen.right()[reference] for seen in split]
        return [replace(exits, reference=right) for exits, right in zip(classifiers, references, strict=True)]

    first, second = (gmacs for _, gmacs in costs.steps(name))
    dense = costs.dense.macs.gmacs
    return saving(compared(val), compared(test), (first, second), dense, resamples=resamples)


def saving_line(name: str, reference: str, value: Saving) -> dict[str, Any]:
    """A saving as plain values, a line of ``savings_table``. reference: whose accuracy it is compared with."""
    return {
        "method": name,
        "reference": reference,
        "saved": value.saved.ends,
        "difference": value.difference.ends,
        "refined": fmean(value.refined),
        "thresholds": list(value.thresholds),
        "chosen": value.chosen,
    }


def curves(test: Sequence[SeedAnswers], costs: Costs, resamples: int = CURVE_RESAMPLES) -> dict[str, Curve]:
    """The ``curve`` of either classifier."""
    exits = {WAVE: [seen.wave for seen in test], CASCADE: [seen.cascade for seen in test]}
    return {name: curve(some, [gmacs for _, gmacs in costs.steps(name)], resamples) for name, some in exits.items()}


def curve(test: Sequence[Exits], steps: Sequence[float], resamples: int = CURVE_RESAMPLES) -> Curve:
    """Accuracy over the seeds against GMACs, when ever more of the least confident pictures are refined.

    steps: GMACs of leaving at the first step and at the second.
    """
    line: Curve = {name: [] for name in ("refined", "gmacs", "accuracy", "low", "high")}
    for share in np.linspace(0, 1, CURVE_POINTS).tolist():
        right, refined = least_confident_refined(test, share)
        values = (refined, steps[0] + share * (steps[1] - steps[0]), *mean_interval(right, resamples).ends)
        for name, value in zip(line, values, strict=True):
            line[name].append(value)
    return line


def draw_curve(axes: Axes, line: Curve, label: str, scale: float = 1, **style: Any) -> None:
    """A ``curve`` in %, with its interval as a band. scale: what a GMAC is drawn as."""
    xs = [scale * gmacs for gmacs in line["gmacs"]]
    (drawn,) = axes.plot(xs, [100 * value for value in line["accuracy"]], label=label, **style)
    if "low" in line:  # results of before curves had intervals are drawn too
        low, high = ([100 * value for value in line[end]] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def draw_point(axes: Axes, gmacs: float, accuracy: Sequence[float], label: str, mark: str = "o") -> None:
    """A model that does not exit early, in %, with its interval. accuracy: middle, low, high."""
    middle, low, high = (100 * value for value in accuracy)
    axes.errorbar(gmacs, middle, [[middle - low], [high - middle]], fmt=f"k{mark}", markersize=5, capsize=3)
    axes.annotate(label, (gmacs, low), (0, -5), textcoords="offset points", fontsize=8, ha="center", va="top")


def savings_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The savings as a Markdown table."""
    head = ["at the accuracy of", "model", "refined", "GMACs saved, % [95 %]", "accuracy against it", "verdict"]
    cells = []
    for line in lines:
        middle, low, high = (100 * value for value in line["saved"])
        alone = "refined" in line
        refined = f"{100 * line['refined']:.1f} %" if alone else "–"
        cells.append(
            [
                line["reference"],
                line["method"],
                refined,
                f"{middle:.1f} [{low:.1f}, {high:.1f}]" if alone else beyond_cascade(lines, line["reference"]),
                points(line.get("difference")),
                verdict(line) if alone else "–",
            ]
        )
    return table(head, cells, left=(0, 1, 5))


def beyond_cascade(lines: Sequence[Mapping[str, Any]], reference: str = "teacher") -> str:
    """How much more WaveCLIP saves than the cascade at a reference's accuracy, or that they cannot be compared.

    A classifier without a threshold refines every picture, at an accuracy that is not the reference's.
    """
    those = [line for line in lines if line["reference"] == reference]
    if not all(line.get("chosen", True) for line in those):
        return NOT_COMPARABLE
    (more,) = (line for line in those if "chosen" not in line)
    return f"{points(more['saved'])} points"


def verdict(line: Mapping[str, Any]) -> str:
    """Whether a line of ``savings_table`` shows a saving, and at an accuracy that test does not refute."""
    if not line["chosen"]:
        lacking, seeds = sum(threshold == NEVER for threshold in line["thresholds"]), len(line["thresholds"])
        if lacking < seeds:
            return f"no saving shown: on val {lacking} of {seeds} seeds had no threshold near enough"
        return "no saving shown: on val no threshold comes near enough"
    if line["difference"][2] < -ALLOWANCE:
        return "no saving shown: on test it is less accurate than val let expect"
    return SAVES if line["saved"][1] > 0 else "no saving shown"


def saved_share(line: Mapping[str, Any]) -> str:
    """The saving of a line of ``savings_table``, in % with its interval."""
    middle, low, high = (100 * value for value in line["saved"])
    return f"{middle:.1f} % [{low:.1f}, {high:.1f}]"


def headline(lines: Sequence[Mapping[str, Any]], seeds: int, more: str) -> str:
    """The protocol's headline in words; with fewer than three training seeds, that there is none.

    more: what trains enough seeds.
    """
    if seeds < HEADLINE_SEEDS:
        return no_headline(seeds, more)
    by_name = {line["method"]: line for line in lines if line["reference"] == "teacher"}
    wave = by_name[WAVE]
    return (
        f"**Headline** ({seeds} training seeds): multiply-adds that WaveCLIP saves at its teacher's accuracy: "
        f"{saved_share(wave) if verdict(wave) == SAVES else 'no saving shown'}; "
        f"less what the cascade saves: {beyond_cascade(lines)}."
    )


def no_headline(seeds: int, more: str) -> str:
    """That so few training seeds make no headline. more: what trains enough."""
    return f"{counted(seeds).capitalize()}: no headline is drawn; {more} trains enough."


def counted(seeds: int, kind: str = "training ") -> str:
    """A number of seeds in words."""
    return f"one {kind}seed" if seeds == 1 else f"{seeds} {kind}seeds"

"""WAVECLIP's Figure 4: the margin against the maximum probability as the gate's confidence, over training seeds.

Shapes: M images, S training seeds.

Both gates read the same answers, those that each training left. They are compared where they refine equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import read_log
from benchmarks.cells import p_value, points, table
from benchmarks.figures import COLOURS, name_lines
from benchmarks.statistics import RESAMPLES, adjusted_p, difference, mean_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.training import shapes as trained
from benchmarks.waveclip import controls, shapes
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.exits import least_confident_refined, over_all_shares, separation
from benchmarks.waveclip.saving import Exits

BINS = 25
GATES = {"margin": "margin", "maximum": "maximum probability"}
SHARES = (0.148, 0.264, 0.558, 0.743)
"""Refined shares at which the gates are compared: those of the paper's four points."""


def compare_gates(students: Sequence[Answers], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Both gates' curves and histograms, the margin's lead at every share, and what the table compares.

    students: answers of two levels, one entry a training seed. p is Holm's over the table's rows.
    """
    exits = {name: [_exits(answers, name) for answers in students] for name in GATES}
    values = _compared(exits)
    leads = {
        what: difference(*by_gate.values(), paired_seeds=True, resamples=resamples) for what, by_gate in values.items()
    }
    adjusted = adjusted_p(leads)
    rows = [
        {
            "what": what,
            **{name: mean_interval(each, resamples).ends for name, each in by_gate.items()},
            "lead": leads[what].ends,
            "p": adjusted[what],
        }
        for what, by_gate in values.items()
    ]
    drawn = min(resamples, controls.CURVE_RESAMPLES)
    gates = {
        name: {"curve": controls.curve(some, (0.0, 1.0), drawn), "histograms": _histograms(some)}
        for name, some in exits.items()
    }
    return {"gates": gates, "lead": _lead(exits, drawn), "rows": rows}


def _exits(answers: Answers, gate: str) -> Exits:
    return replace(answers.exits(answers.last), confidence=getattr(answers, gate)[0])


def _compared(exits: Mapping[str, Sequence[Exits]]) -> dict[str, dict[str, np.ndarray]]:
    """Values [S,M] whose means a row of the table compares, by the row's name and the gate."""

    def by_gate(value: Callable[[Exits], np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.stack([value(each) for each in some]) for name, some in exits.items()}

    shares = {
        f"accuracy, {100 * share:.1f} % refined": {
            name: least_confident_refined(some, share)[0] for name, some in exits.items()
        }
        for share in SHARES
    }
    return {
        "AUROC: the coarse level is right": by_gate(lambda each: separation(each.confidence, each.first)),
        "accuracy, mean over all refined shares": by_gate(over_all_shares),
        **shares,
    }


def _lead(exits: Mapping[str, Sequence[Exits]], resamples: int) -> dict[str, list[float]]:
    """The margin's accuracy less the maximum's at each share of a curve, with the interval's ends."""
    line: dict[str, list[float]] = {name: [] for name in ("refined", "lead", "low", "high")}
    for share in np.linspace(0, 1, controls.CURVE_POINTS).tolist():
        margin, maximum = (least_confident_refined(some, share)[0] for some in exits.values())
        ends = difference(margin, maximum, paired_seeds=True, resamples=resamples).ends
        for name, value in zip(line, (share, *ends), strict=True):
            line[name].append(value)
    return line


def _histograms(some: Sequence[Exits]) -> dict[str, list[int]]:
    """Pictures of all seeds by the coarse level's confidence over [0, 1], where it is right and where it is wrong."""
    confidence, right = (np.concatenate([getattr(each, name) for each in some]) for name in ("confidence", "first"))
    groups = {"right": right, "wrong": ~right}
    return {name: np.histogram(confidence[group], BINS, (0, 1))[0].tolist() for name, group in groups.items()}


def run(smoke: bool = False) -> dict[str, Any]:
    """The comparison on ``test`` from the answers that trainings left (smoke: few resamples).

    ValueError: no WaveCLIP has left answers.
    """
    students = trained.finished().get("shapes-waveclip", {}).get("test", {})
    if not students:
        raise ValueError("no answers of shapes-waveclip; `make retrain ONLY='shapes-waveclip-*'` trains it")
    return {
        "name": "waveclip-fig4",
        "conditions": shapes.conditions_of_a_sweep(len(students)),
        "pictures": next(iter(students.values())).correct.shape[1],
        **compare_gates(list(students.values()), 20 if smoke else RESAMPLES),
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    rows = [
        [
            row["what"],
            *(f"{100 * row[name][0]:.2f}" for name in GATES),
            points(row["lead"], decimals=2),
            p_value(row["p"]),
        ]
        for row in result["rows"]
    ]
    head = ["%, of test", *GATES.values(), "the margin's lead, points [95 %]", "p, Holm"]
    run = result["conditions"]
    note = (
        f"Embedded scale, {result['pictures']:,} test pictures of the scenes of shape, {run['seeds']} training seeds. "
        "Each seed's least confident pictures are refined; AUROC is how often a picture that the coarse level names "
        "rightly is more confident than one that it does not. Intervals resample seeds and pictures, in pairs, and p "
        "is adjusted over these rows. The table reads the answers that the trainings left. The paper draws this "
        f"comparison without numbers.{read_log.remark(run)}"
    )
    return {
        "md": "\n\n".join([table(head, rows), sentence(), note]) + "\n",
        "figures": {"waveclip-fig4": _draw(result)},
    }


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.5, 6.4), layout="constrained")
    (curve, lead), histograms = figure.subplots(2, 2)
    # The two curves all but meet, so the second is dashed over the first.
    for (name, gate), style in zip(result["gates"].items(), ("-", "--"), strict=True):
        controls.draw_curve(curve, gate["curve"], GATES[name], scale=100, linestyle=style)
    curve.set(title="accuracy by the share refined", xlabel="refined, %", ylabel="top-1, %")
    line = result["lead"]
    shares, middle, low, high = ([100 * value for value in line[name]] for name in ("refined", "lead", "low", "high"))
    lead.plot(shares, middle, color=COLOURS[2])
    lead.fill_between(shares, low, high, color=COLOURS[2], alpha=0.2, linewidth=0)
    lead.axhline(0, color="0.5", linewidth=0.8)
    lead.set(title="the margin's lead, paired", xlabel="refined, %", ylabel="points of top-1")
    for panel, (name, gate), row in zip(histograms, result["gates"].items(), 2 * [result["rows"][0]], strict=True):
        _draw_histograms(panel, gate["histograms"])
        panel.set(title=f"{GATES[name]} (AUROC {row[name][0]:.3f})", xlabel=GATES[name], ylabel="pictures of all seeds")
    name_lines(curve)
    return figure


def _draw_histograms(panel: Axes, histograms: Mapping[str, Sequence[int]]) -> None:
    """Outlines of both histograms, so that neither hides the other."""
    edges = [place / BINS for place in range(BINS + 1)]
    for (outcome, counts), colour in zip(histograms.items(), (COLOURS[0], COLOURS[1]), strict=True):
        panel.stairs(counts, edges, color=colour, fill=True, alpha=0.15)
        panel.stairs(counts, edges, color=colour, label=f"coarse level {outcome}")
    panel.legend(loc="upper center")

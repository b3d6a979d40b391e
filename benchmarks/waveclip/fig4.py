"""WAVECLIP's Figure 4: the margin against the maximum probability as the gate's confidence.

Shapes: M images.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import read_log
from benchmarks.cells import table
from benchmarks.statistics import share_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.waveclip.exits import curve_by_share, separation
from benchmarks.waveclip.observed import Observed, observed, sweep_conditions
from common.early_exit import exit_at, threshold_for
from common.evaluate.accuracy import paired_difference

BINS = 25
GATES = {"margin": "margin", "maximum": "maximum probability"}
SHARES = (0.148, 0.264, 0.558, 0.743)
"""Refined shares at which the gates are compared: those of the paper's four points."""


def compare_gates(answers: Observed) -> dict[str, Any]:
    """Both gates' curves, separations and histograms, and their paired difference at equal shares.

    answers: of a student of one level.
    """
    confidences = {name: getattr(answers, name) for name in GATES}
    points = []
    for share in SHARES:
        correct = []
        for confidence in confidences.values():
            correct.append(exit_at(threshold_for(confidence[0], share), confidence, answers.correct)[0])
        points.append({"refined": share, "difference": paired_difference(*correct)})
    gates = {name: _gate(confidence[0], answers) for name, confidence in confidences.items()}
    return {"gates": gates, "points": points}


def _gate(confidence: Tensor, answers: Observed) -> dict[str, Any]:
    shares, accuracy = curve_by_share(confidence, answers.coarse, answers.fine)
    pictures = len(answers.coarse)
    intervals = [share_interval(round(value * pictures), pictures) for value in accuracy]
    histograms = {
        name: torch.histc(confidence[group], BINS, 0, 1).long().tolist()
        for name, group in (("right", answers.coarse), ("wrong", ~answers.coarse))
    }
    return {
        "frontier": {"refined": shares, "accuracy": accuracy, "interval": intervals},
        "mean_accuracy": sum(accuracy) / len(accuracy),
        "auroc_right": separation(confidence, answers.coarse),
        "auroc_agrees": separation(confidence, answers.agrees[0]),
        "histograms": histograms,
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """The comparison on ``test`` with the committed weights (smoke: its first 500 images)."""
    run_conditions = sweep_conditions()
    test = observed("test", smoke)
    return {"name": "waveclip-fig4", "conditions": run_conditions, "pictures": len(test.teacher)} | compare_gates(test)


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    head = ["gate", "AUROC: coarse is right", "AUROC: coarse agrees with fine", "mean accuracy over all shares"]
    rows = [
        [
            GATES[name],
            f"{gate['auroc_right']:.4f}",
            f"{gate['auroc_agrees']:.4f}",
            f"{100 * gate['mean_accuracy']:.2f}",
        ]
        for name, gate in result["gates"].items()
    ]
    differences = []
    for point in result["points"]:
        middle, low, high = (100 * value for value in point["difference"])
        differences.append([f"{100 * point['refined']:.1f} %", f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"])
    beside = table(["refined", "accuracy with the margin minus with the maximum, points"], differences, left=())
    note = (
        f"Embedded scale, {result['pictures']:,} test pictures of the scenes of shape, the least confident of them "
        "refined, of one training seed. Brackets: paired bootstrap intervals at 95 %, and bands those of each curve "
        f"alone. The paper draws this comparison without numbers.{read_log.remark(result['conditions'])}"
    )
    parts = [table(head, rows), beside, sentence(), note]
    return {"md": "\n\n".join(parts) + "\n", "figures": {"waveclip-fig4": _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    curve, *histograms = figure.subplots(1, 3)
    edges = [i / BINS for i in range(BINS)]
    for panel, (name, gate) in zip(histograms, result["gates"].items(), strict=True):
        points = gate["frontier"]
        shares = [100 * share for share in points["refined"]]
        (line,) = curve.plot(shares, [100 * right for right in points["accuracy"]], label=GATES[name])
        low, high = ([100 * value for value in ends] for ends in zip(*points["interval"], strict=True))
        curve.fill_between(shares, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for outcome, colour in (("right", "C2"), ("wrong", "C1")):
            values = gate["histograms"][outcome]
            panel.bar(edges, values, 1 / BINS, align="edge", alpha=0.55, color=colour, label=f"coarse {outcome}")
        panel.set(title=f"{GATES[name]} (AUROC {gate['auroc_right']:.3f})", xlabel=GATES[name], ylabel="pictures")
        panel.legend()
    curve.set(title="frontier", xlabel="refined, %", ylabel="top-1, %")
    curve.legend(loc="best")
    return figure

"""What early exit saves at a reference's accuracy, with an interval that holds the threshold's choice.

Shapes: M pictures, S training seeds, R resamples.

A two-step classifier (a WaveCLIP of one level, or a cascade of two models) answers at its first step where the
confidence reaches a threshold, else at its second. The threshold is the cheapest one with which, on val, the paired
interval of the accuracy difference to the reference stays above an allowance; the saving is measured on test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import NormalDist

import numpy as np

from benchmarks.statistics import CONFIDENCE, RESAMPLES, Interval, chosen_seeds, ends, picture_weights
from common.early_exit import NEVER

ALLOWANCE = 0.005
"""How far below the reference an operating point may lie: half a point."""
SHARES = np.linspace(0, 1, 101)
"""Shares of refined pictures among which the threshold is chosen."""


@dataclass(frozen=True)
class Exits:
    """One trained two-step classifier on M pictures.

    confidence: fp32 or fp64 [M], of the first step.  first, second: bool [M], which step's answer is right.
    reference: bool [M], the answers of the model that it is compared with; its own second step, to see what the gate
    loses.
    """

    confidence: np.ndarray
    first: np.ndarray
    second: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Saving:
    """Multiply-adds saved (a share of the dense model's) and the accuracy difference to the reference, on test.

    thresholds, refined: of each training seed.  chosen: whether val had such a threshold for every seed; where it has
    none, all pictures are refined.  draws: the saved share in every resample [R], for ``less``.
    """

    saved: Interval
    difference: Interval
    thresholds: tuple[float, ...]
    refined: tuple[float, ...]
    chosen: bool
    draws: np.ndarray = field(compare=False, repr=False)

    def less(self, other: Saving) -> Interval:
        """How much more is saved than by another classifier that saw the same pictures, trained from the same seeds."""
        return _interval(self.saved.middle - other.saved.middle, self.draws - other.draws, self.saved.seeds)


def saving(
    val: Sequence[Exits],
    test: Sequence[Exits],
    costs: tuple[float, float],
    dense: float,
    allowance: float = ALLOWANCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Saving:
    """The saving over the training seeds of one recipe.

    val, test: one entry a seed, in the same order.  costs: of leaving at either step.  dense: the reference model's.
    """
    points = [_Gate(exits, allowance) for exits in val]
    choices = [gate.choose(None) for gate in points]
    thresholds = tuple(threshold for threshold, _ in choices)
    measured = [_measure(exits, threshold, None) for exits, threshold in zip(test, thresholds, strict=True)]

    # One row a resample, one column a seed: refined share and difference, with the threshold chosen anew.
    draws = np.empty((resamples, len(val), 2))
    weights = zip(
        chain.from_iterable(picture_weights(len(val[0].first), resamples, seed)),
        chain.from_iterable(picture_weights(len(test[0].first), resamples, seed + 1)),
        strict=True,
    )
    for row, (on_val, on_test) in enumerate(weights):
        for column, (gate, exits) in enumerate(zip(points, test, strict=True)):
            draws[row, column] = _measure(exits, gate.choose(on_val)[0], on_test)
    chosen = chosen_seeds(len(val), resamples, seed)[..., None]
    drawn = np.take_along_axis(draws, chosen, axis=1).mean(axis=1)

    refined, differences = (np.array(column) for column in zip(*measured, strict=True))
    saved = _saved(drawn[:, 0], costs, dense)
    return Saving(
        _interval(_saved(refined.mean(), costs, dense), saved, len(val)),
        _interval(differences.mean(), drawn[:, 1], len(val)),
        thresholds,
        tuple(refined.tolist()),
        all(reached for _, reached in choices),
        saved,
    )


class _Gate:
    """One seed's val pictures in the order of their confidence, ready for many choices of a threshold."""

    def __init__(self, exits: Exits, allowance: float) -> None:
        self.order = np.argsort(exits.confidence, kind="stable")
        ordered = exits.confidence[self.order].astype(np.float64)
        # Half-way between neighbours; below all, and above all.
        self.edges = np.concatenate([[0.0], (ordered[1:] + ordered[:-1]) / 2, [NEVER]])
        # A threshold refines all pictures of equal confidence or none, so a place within a tie is the one before it.
        self.places = np.concatenate([np.searchsorted(ordered, ordered, side="left"), [len(ordered)]])
        answers = np.stack([exits.first, exits.second]).astype(np.float64) - exits.reference
        self.first, self.second = answers[:, self.order]
        self.allowance = allowance

    def choose(self, weights: np.ndarray | None) -> tuple[float, bool]:
        """The cheapest sufficient threshold for pictures drawn so often (None: once each), and whether there is one."""
        weights = np.ones(len(self.order)) if weights is None else weights[self.order].astype(np.float64)
        total = weights.sum()
        drawn = np.concatenate([[0.0], np.cumsum(weights)])
        places = self.places[np.minimum(np.searchsorted(drawn, SHARES * total), len(self.order))]
        # The mean difference and its square when the pictures before each place are refined.
        moments = []
        for first, second in ((self.first, self.second), (self.first**2, self.second**2)):
            gained = np.concatenate([[0.0], np.cumsum(weights * (second - first))])
            moments.append(((weights * first).sum() + gained[places]) / total)
        middle, square = moments
        half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * np.sqrt(np.maximum(square - middle**2, 0) / total)
        sufficient = np.flatnonzero(middle - half >= -self.allowance)
        return (float(self.edges[places[sufficient[0]]]), True) if len(sufficient) else (NEVER, False)


def _measure(exits: Exits, threshold: float, weights: np.ndarray | None) -> tuple[float, float]:
    """The share of refined pictures behind a threshold, and the accuracy difference to the reference."""
    weights = np.ones(len(exits.first)) if weights is None else weights
    refined = exits.confidence < threshold
    answers = np.where(refined, exits.second, exits.first).astype(np.float64) - exits.reference
    return float((weights * refined).sum() / weights.sum()), float((weights * answers).sum() / weights.sum())


def _saved(refined: np.ndarray | float, costs: tuple[float, float], dense: float) -> np.ndarray | float:
    return 1 - (costs[0] + refined * (costs[1] - costs[0])) / dense


def _interval(middle: float, draws: np.ndarray, seeds: int) -> Interval:
    return Interval(float(middle), *ends(draws), seeds)

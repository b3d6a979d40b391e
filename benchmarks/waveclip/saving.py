"""What early exit saves at a reference's accuracy, with an interval that holds the threshold's choice.

Shapes: M pictures, L steps of a classifier, S training seeds, R resamples.

A two-step classifier (a WaveCLIP of one level, or a cascade of two models) answers at its first step where the
confidence reaches a threshold, else at its second; a WaveCLIP of more levels has one threshold for all of them. It is
the cheapest one with which, on val, the paired interval of the accuracy difference to the reference stays above an
allowance; the saving is measured on test.
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

    def steps(self) -> Steps:
        """The same as a classifier of two steps."""
        return Steps(self.confidence[None], np.stack([self.first, self.second]), self.reference)


@dataclass(frozen=True)
class Steps:
    """One trained classifier of any number of steps behind one threshold, on M pictures.

    surest: fp32 or fp64 [L-1,M], the greatest confidence of all steps so far; a picture goes on where it is below the
    threshold.  correct: bool [L,M], which step's answer is right.  reference: as that of ``Exits``.
    """

    surest: np.ndarray
    correct: np.ndarray
    reference: np.ndarray

    def steps(self) -> Steps:
        """Itself."""
        return self

    def at(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Which answers that stand are right, bool [M], and which pictures go on after each step but the last."""
        goes_on = self.surest < threshold
        return np.take_along_axis(self.correct, goes_on.sum(0)[None], axis=0)[0], goes_on


@dataclass(frozen=True)
class Saving:
    """Multiply-adds saved (a share of the dense model's) and the accuracy difference to the reference, on test.

    thresholds, refined: of each training seed; refined are the pictures that go on after the first step.  chosen:
    whether val had such a threshold for every seed; where it has none, all pictures are refined.  draws: the saved
    share in every resample [R], for ``less``.
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
    val: Sequence[Exits | Steps],
    test: Sequence[Exits | Steps],
    costs: Sequence[float],
    dense: float,
    allowance: float = ALLOWANCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Saving:
    """The saving over the training seeds of one recipe.

    val, test: one entry a seed, in the same order.  costs: of leaving at each step [L].  dense: the reference model's.
    """
    seen = [exits.steps() for exits in test]
    points = [_Gate(exits.steps(), allowance) for exits in val]
    choices = [gate.choose(None) for gate in points]
    thresholds = tuple(threshold for threshold, _ in choices)
    measured = [_measure(steps, threshold, None) for steps, threshold in zip(seen, thresholds, strict=True)]

    # One row a resample, one column a seed: the shares that go on after each step, and the difference, with the
    # threshold chosen anew.
    draws = np.empty((resamples, len(val), len(costs)))
    weights = zip(
        chain.from_iterable(picture_weights(len(val[0].reference), resamples, seed)),
        chain.from_iterable(picture_weights(len(test[0].reference), resamples, seed + 1)),
        strict=True,
    )
    for row, (on_val, on_test) in enumerate(weights):
        for column, (gate, steps) in enumerate(zip(points, seen, strict=True)):
            draws[row, column] = _measure(steps, gate.choose(on_val)[0], on_test)
    chosen = chosen_seeds(len(val), resamples, seed)[..., None]
    drawn = np.take_along_axis(draws, chosen, axis=1).mean(axis=1)

    found = np.array(measured)
    saved = _saved(drawn, costs, dense)
    return Saving(
        _interval(_saved(found.mean(0), costs, dense), saved, len(val)),
        _interval(found[:, -1].mean(), drawn[:, -1], len(val)),
        thresholds,
        tuple(found[:, 0].tolist()),
        all(reached for _, reached in choices),
        saved,
    )


class _Gate:
    """One seed's val pictures in the order of their confidence, ready for many choices of a threshold."""

    def __init__(self, steps: Steps, allowance: float) -> None:
        # A picture stands here once for each step that it may leave: with its confidence by then, and what going on
        # changes.
        confidence = steps.surest.ravel()
        self.order = np.argsort(confidence, kind="stable")
        ordered = confidence[self.order].astype(np.float64)
        # Half-way between neighbours; below all, and above all.
        self.edges = np.concatenate([[0.0], (ordered[1:] + ordered[:-1]) / 2, [NEVER]])
        # A threshold refines all pictures of equal confidence or none, so a place within a tie is the one before it.
        self.places = np.concatenate([np.searchsorted(ordered, ordered, side="left"), [len(ordered)]])
        answers = steps.correct.astype(np.float64) - steps.reference
        self.moments = [(power[0], np.diff(power, axis=0).ravel()[self.order]) for power in (answers, answers**2)]
        self.levels, self.allowance = len(steps.surest), allowance

    def choose(self, weights: np.ndarray | None) -> tuple[float, bool]:
        """The cheapest sufficient threshold for pictures drawn so often (None: once each), and whether there is one."""
        pictures = len(self.order) // self.levels
        each = np.ones(pictures) if weights is None else weights.astype(np.float64)
        total, weights = each.sum(), np.tile(each, self.levels)[self.order]
        drawn = np.concatenate([[0.0], np.cumsum(weights)])
        places = self.places[np.minimum(np.searchsorted(drawn, SHARES * drawn[-1]), len(self.order))]
        # The mean difference and its square when all before each place go on.
        means = []
        for first, change in self.moments:
            gained = np.concatenate([[0.0], np.cumsum(weights * change)])
            means.append(((each * first).sum() + gained[places]) / total)
        middle, square = means
        half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * np.sqrt(np.maximum(square - middle**2, 0) / total)
        sufficient = np.flatnonzero(middle - half >= -self.allowance)
        return (float(self.edges[places[sufficient[0]]]), True) if len(sufficient) else (NEVER, False)


def _measure(steps: Steps, threshold: float, weights: np.ndarray | None) -> list[float]:
    """The shares of pictures that go on after each step behind a threshold, then the difference to the reference."""
    weights = np.ones(len(steps.reference)) if weights is None else weights
    right, goes_on = steps.at(threshold)
    values = [*goes_on, right.astype(np.float64) - steps.reference]
    return [float((weights * value).sum() / weights.sum()) for value in values]


def _saved(measured: np.ndarray, costs: Sequence[float], dense: float) -> np.ndarray | float:
    """The share of ``dense`` that is saved. measured: rows of ``_measure`` [...,L]."""
    return 1 - (costs[0] + measured[..., :-1] @ np.diff(costs)) / dense


def _interval(middle: float, draws: np.ndarray, seeds: int) -> Interval:
    return Interval(float(middle), *ends(draws), seeds)

"""From what every path of a model said of labelled pictures to a setting for a budget or a target, with intervals.

Shapes: M pictures, P paths cheapest first, S settings from the cheapest to the dearest, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.deploy.early_exit import ThresholdSweep
from common.evaluate.accuracy import wilson_interval

_POINTS = 200
"""Points of the curve that a calibration keeps, beside the chosen one."""


@dataclass(frozen=True)
class Outcomes:
    """What the paths said about M pictures.

    costs: GMACs of each path [P].  correct: bool [M,P].
    confidence: [M,P-1], by which a picture stops at the first path that reaches the threshold; None where a setting
        is the path of all pictures.
    paths: with no confidence, the setting of each path [P].
    """

    costs: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray | None = None
    paths: Sequence[float] = ()

    def settings(self) -> np.ndarray:
        """All settings that differ on these pictures [S]: thresholds half-way between confidences, or the paths'."""
        if self.confidence is None:
            return np.asarray(self.paths, dtype=float)
        return self._sweep.thresholds

    def curve(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean GMACs and accuracy at every setting, both [S]; weights: how often each picture counts [M]."""
        weights = np.ones(len(self.correct)) if weights is None else weights
        accuracy = weights @ self.correct / weights.sum()
        if self.confidence is None:
            return np.asarray(self.costs, dtype=float), accuracy
        gmacs = self.costs[0] + self._sweep.gain(self.costs, weights)
        return gmacs, accuracy[0] + self._sweep.gain(self.correct.astype(float), weights)

    @cached_property
    def _sweep(self) -> ThresholdSweep:
        return ThresholdSweep(self.confidence)


@dataclass(frozen=True)
class Wish:
    """What a setting is chosen for: at most ``gmacs`` a picture on average, or at least ``accuracy``; one of them."""

    gmacs: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if (self.gmacs is None) == (self.accuracy is None):
            raise ValueError("give a budget (--gmacs) or a target (--accuracy), one of them")
        if self.accuracy is not None and not 0 < self.accuracy < 1:
            raise ValueError(f"--accuracy {self.accuracy} must be a fraction in (0, 1), such as 0.60")

    def rule(self, pictures: int) -> Callable[[np.ndarray, np.ndarray], int]:
        """(GMACs [S], accuracy [S]) on M pictures -> the chosen place, or -1 where there is none.

        The dearest setting within the budget; the cheapest one whose accuracy has Wilson's 95 % interval above the
        target.
        """
        if self.gmacs is not None:
            return lambda gmacs, _: int(np.searchsorted(gmacs, self.gmacs * (1 + 1e-9), side="right")) - 1
        least = least_correct(self.accuracy, pictures)

        def cheapest(_: np.ndarray, accuracy: np.ndarray) -> int:
            enough = accuracy * pictures >= least - 1e-6
            return int(enough.argmax()) if enough.any() else -1

        return cheapest


def least_correct(target: float, total: int) -> int:
    """The least number of right answers among ``total`` whose 95 % interval lies at or above ``target``."""
    low, high = 0, total + 1
    while low < high:
        middle = (low + high) // 2
        if middle <= total and wilson_interval(middle, total)[0] < target:
            low = middle + 1
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Point:
    """A setting, and what it costs and gets right on average; the intervals are those of M new pictures."""

    setting: float
    gmacs: float
    accuracy: float
    gmacs_interval: tuple[float, float]
    accuracy_interval: tuple[float, float]


def choose(outcomes: Outcomes, wish: Wish, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Point:
    """The setting for a wish, with the intervals of mean cost and accuracy on as many new pictures of the kind.

    Bootstrap: the setting is chosen on one resample of the pictures and measured on another, so that the intervals
    hold both what the choice owes to chance and what the new pictures will. ValueError: no setting will do.
    """
    settings, (gmacs, accuracy) = outcomes.settings(), outcomes.curve()
    pictures = len(outcomes.correct)
    rule = wish.rule(pictures)
    place = rule(gmacs, accuracy)
    if place < 0:
        raise ValueError(_impossible(wish, gmacs, accuracy, pictures))
    random = np.random.default_rng(seed)
    even = np.full(pictures, 1 / pictures)
    found = []
    for _ in range(resamples):
        chosen = rule(*outcomes.curve(random.multinomial(pictures, even)))
        # Where a resample offers nothing the user would be refused; the end that comes nearest stands for it.
        nearest = chosen if chosen >= 0 else (0 if wish.accuracy is None else len(settings) - 1)
        found.append([part[nearest] for part in outcomes.curve(random.multinomial(pictures, even))])
    ends = np.quantile(np.array(found), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    costs, rights = (tuple(map(float, column)) for column in ends.T)
    return Point(float(settings[place]), float(gmacs[place]), float(accuracy[place]), costs, rights)


def _impossible(wish: Wish, gmacs: np.ndarray, accuracy: np.ndarray, pictures: int) -> str:
    if wish.gmacs is not None:
        return f"{wish.gmacs:g} GMACs a picture: the cheapest path costs {gmacs[0]:.4g}; give that or more"
    best = accuracy.max()
    low = wilson_interval(round(best * pictures), pictures)[0]
    return (
        f"accuracy {wish.accuracy:g}: the best setting has {best:.4f} on {pictures:,} pictures, whose interval begins "
        f"at {low:.4f}; ask for that or less, or calibrate on more pictures"
    )


@dataclass(frozen=True)
class Calibration:
    """What ``effclip calibrate`` keeps of a model.

    knob: what the settings are, "threshold" or "keep".  wish and point: what was asked for and chosen.
    curve: [setting, GMACs, accuracy] over all settings.  pictures: M.  costs: GMACs of the paths.
    weights: the model's hashes.  prompts: hash of class names and templates.  conditions: data, split and the rest.
    """

    knob: str
    wish: dict[str, float | None]
    point: Point
    curve: list[list[float]]
    pictures: int
    costs: list[float]
    weights: dict[str, str]
    prompts: str
    conditions: dict[str, Any]

    def within(self, gmacs: float) -> float:
        """The setting of the greatest mean cost within ``gmacs``. ValueError: below the cheapest."""
        points = [*self.curve, [self.point.setting, self.point.gmacs, self.point.accuracy]]
        fitting = [(cost, setting) for setting, cost, _ in points if cost <= gmacs * (1 + 1e-9)]
        if not fitting:
            raise ValueError(f"--gmacs {gmacs:g}: the cheapest path costs {min(self.costs):.4g}; give that or more")
        return max(fitting)[1]

    def write(self, file: Path) -> None:
        """Write as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """Read what ``write`` wrote. ValueError: another kind of file."""
        try:
            fields = json.loads(file.read_text())
            point = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.pop("point").items()}
            return cls(point=Point(**point), **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no calibration ({error}); `effclip calibrate` writes one") from error


def thinned(outcomes: Outcomes) -> list[list[float]]:
    """[setting, GMACs, accuracy] of at most 200 settings spread over all, the ends among them."""
    gmacs, accuracy = outcomes.curve()
    places = np.unique(np.linspace(0, len(gmacs) - 1, _POINTS).round().astype(int))
    return np.stack([outcomes.settings(), gmacs, accuracy], axis=1)[places].tolist()

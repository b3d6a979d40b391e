"""Choose a threshold or keep rate for a budget or a target accuracy, with bootstrap intervals.

The input is the outcome of every path of a model on labelled images.
Shapes: M images, P paths (cheapest first), S settings (cheapest first).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.early_exit import ThresholdSweep
from common.evaluate.accuracy import wilson_interval
from common.paths import written_whole

_POINTS = 200
"""Points of the curve that a calibration keeps, besides the chosen one."""


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every path on M labelled images.

    costs: GMACs of each path [P].  correct: bool [M,P].
    confidence: [M,P-1], of every path but the last; an image exits at the first path that reaches the threshold.
        None: one setting serves all images.
    paths: the setting of each path [P], where there is no confidence.
    """

    costs: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray | None = None
    paths: Sequence[float] = ()

    def settings(self) -> np.ndarray:
        """The settings [S] that differ on these images: half-way between confidences, or the paths'."""
        if self.confidence is None:
            return np.asarray(self.paths, dtype=float)
        return self._sweep.thresholds

    def curve(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean GMACs and accuracy at every setting, both [S].

        weights: how often each image counts [M]; None: once.
        """
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
    """What a setting must meet: a mean cost of at most ``gmacs`` an image, or an accuracy of at least ``accuracy``."""

    gmacs: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if (self.gmacs is None) == (self.accuracy is None):
            raise ValueError("give a budget (--gmacs) or a target (--accuracy), one of them")
        if self.gmacs is not None and not self.gmacs > 0:
            raise ValueError(f"--gmacs {self.gmacs:g} must be a number above 0, such as 0.015")
        if self.accuracy is not None and not 0 < self.accuracy < 1:
            raise ValueError(f"--accuracy {self.accuracy} must be a fraction in (0, 1), such as 0.60")

    def rule(self, images: int) -> Callable[[np.ndarray, np.ndarray], int]:
        """(GMACs [S], accuracy [S]) on M images -> the index of the chosen setting, or -1 if none meets the wish.

        For a budget, this is the dearest setting within it. For a target, it is the cheapest setting whose accuracy
        has a Wilson 95 % interval at or above the target.
        """
        if self.gmacs is not None:
            return lambda gmacs, _: int(np.searchsorted(gmacs, self.gmacs * (1 + 1e-9), side="right")) - 1
        least = least_correct(self.accuracy, images)

        def cheapest(_: np.ndarray, accuracy: np.ndarray) -> int:
            enough = accuracy * images >= least - 1e-6
            return int(enough.argmax()) if enough.any() else -1

        return cheapest


def least_correct(target: float, total: int) -> int:
    """The smallest number of correct answers among ``total`` whose 95 % interval lies at or above ``target``."""
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
    """A setting with its mean cost and accuracy, and the intervals of both on M new images."""

    setting: float
    gmacs: float
    accuracy: float
    gmacs_interval: tuple[float, float]
    accuracy_interval: tuple[float, float]


def choose(outcomes: Outcomes, wish: Wish, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Point:
    """The setting for a wish, with intervals of its mean cost and accuracy on as many new images of the same kind.

    Each bootstrap round chooses the setting on one resample of the images and measures it on another. So the intervals
    cover both the chance in the choice and the chance in the new images. ValueError: no setting meets the wish.
    """
    # 1. Choose on all images.
    settings, (gmacs, accuracy) = outcomes.settings(), outcomes.curve()
    images = len(outcomes.correct)
    rule = wish.rule(images)
    index = rule(gmacs, accuracy)
    if index < 0:
        raise ValueError(_impossible(wish, gmacs, accuracy, images))
    # 2. Choose on a resample, measure on another.
    random = np.random.default_rng(seed)
    even = np.full(images, 1 / images)
    measured = []
    for _ in range(resamples):
        chosen = rule(*outcomes.curve(random.multinomial(images, even)))
        # No setting meets the wish on this resample: the one that comes nearest stands in.
        nearest = chosen if chosen >= 0 else (0 if wish.accuracy is None else len(settings) - 1)
        measured.append([values[nearest] for values in outcomes.curve(random.multinomial(images, even))])
    # 3. The intervals are quantiles of what was measured.
    ends = np.quantile(np.array(measured), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    gmacs_interval, accuracy_interval = (tuple(map(float, column)) for column in ends.T)
    return Point(float(settings[index]), float(gmacs[index]), float(accuracy[index]), gmacs_interval, accuracy_interval)


def _impossible(wish: Wish, gmacs: np.ndarray, accuracy: np.ndarray, images: int) -> str:
    if wish.gmacs is not None:
        return f"{wish.gmacs:g} GMACs a picture: the cheapest path costs {gmacs[0]:.4g}; give that or more"
    best = accuracy.max()
    low = wilson_interval(round(best * images), images)[0]
    return (
        f"accuracy {wish.accuracy:g}: the best setting has {best:.4f} on {images:,} pictures, whose interval begins "
        f"at {low:.4f}; ask for that or less, or calibrate on more pictures"
    )


@dataclass(frozen=True)
class Calibration:
    """The result of ``effclip calibrate``; the fields are those of its JSON file.

    knob: the name of the setting, "threshold" or "keep".  wish, point: the request and the chosen setting.
    curve: [setting, GMACs, accuracy], spread over all settings.  pictures: M.  costs: GMACs of each path [P].
    weights: the model's hashes.  prompts: the hash of class names and templates.  conditions: data, split, versions.
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

    @property
    def is_sound(self) -> bool:
        """Whether its values are of the kinds that a classification computes with; a file may be edited by hand."""
        point, entries = self.point, (self.wish, self.weights, self.conditions)
        numbers = [point.setting, point.gmacs, point.accuracy, self.pictures]
        for values in (point.gmacs_interval, point.accuracy_interval, self.costs, *self.curve):
            numbers += values
        return all(isinstance(number, int | float) for number in numbers) and all(isinstance(e, dict) for e in entries)

    def within(self, gmacs: float) -> float:
        """The setting with the greatest mean cost within ``gmacs``. ValueError: the cheapest path costs more."""
        points = [*self.curve, [self.point.setting, self.point.gmacs, self.point.accuracy]]
        fitting = [(cost, setting) for setting, cost, _ in points if cost <= gmacs * (1 + 1e-9)]
        if not fitting:
            raise ValueError(f"--gmacs {gmacs:g}: the cheapest path costs {min(self.costs):.4g}; give that or more")
        return max(fitting)[1]

    def write(self, file: Path) -> None:
        """Write as JSON."""
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """Read a file that ``write`` wrote. ValueError for any other."""
        try:
            fields = json.loads(file.read_text())
            point = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.pop("point").items()}
            read = cls(point=Point(**point), **fields)
            if not read.is_sound:
                raise ValueError("a value is of another kind")
            return read
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no calibration ({error}); `effclip calibrate` writes one") from error


def calibration_file(name: str) -> Path:
    """The file of ``--calibration NAME|FILE``: a path that ends in .json, or a name among the stored ones.

    They are stored in $EFFCLIP_RUNS, or in the user's data folder where that is not set. The working directory is no
    place for them: what a classification costs would depend on it. ValueError: the name is empty.
    """
    if not name:
        raise ValueError("--calibration is empty, as of a variable that is not set; give a name or a .json file")
    if name.endswith(".json"):
        return Path(name).expanduser()
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    return Path(os.environ.get("EFFCLIP_RUNS") or data / "effclip") / "calibrations" / f"{name}.json"


def thinned(outcomes: Outcomes) -> list[list[float]]:
    """[setting, GMACs, accuracy] of at most 200 settings, spread evenly from the first to the last."""
    gmacs, accuracy = outcomes.curve()
    indices = np.unique(np.linspace(0, len(gmacs) - 1, _POINTS).round().astype(int))
    return np.stack([outcomes.settings(), gmacs, accuracy], axis=1)[indices].tolist()

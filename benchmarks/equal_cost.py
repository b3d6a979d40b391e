"""Answers at equal multiply-adds, between two settings, and those of the sweeps in ``benchmarks/results/sweeps``.

Shapes: S training seeds, M pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from benchmarks import RESULTS
from benchmarks.cells import points
from benchmarks.statistics import difference
from common.evaluate.sweep.pictures import unpacked

SWEEPS = {"shapes": "scenes of shape", "cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
"""The folders of the sweeps, and what tables call their data."""


@dataclass(frozen=True)
class At:
    """A reducer at a cost. keep: its keep rate.  right: [1,M] in [0,1], the share of a right answer."""

    keep: float
    right: Tensor


@dataclass(frozen=True)
class Sweep:
    """What one tower answers.

    whole: bool [1,M], the whole tower's right answers.
    measured: by reducer, what was measured by its share of the whole tower's multiply-adds, cheapest first.
    """

    whole: Tensor
    measured: Mapping[str, Mapping[float, At]]

    def at(self, reducer: str, share: float) -> At | None:
        """A reducer at a share of the multiply-adds; None: all that was measured costs more, or all less."""
        return at_share(self.measured.get(reducer, {}), share)


def between(cost: float, fewer: tuple[float, Tensor], more: tuple[float, Tensor]) -> Tensor:
    """The answers at a cost that lies between two of (cost, answers [S,M]), as an accuracy interpolated linearly."""
    weight = (cost - fewer[0]) / (more[0] - fewer[0])
    return (1 - weight) * fewer[1].float() + weight * more[1].float()


def at_share(measured: Mapping[float, At], share: float) -> At | None:
    """See ``Sweep.at``: the answers, and the keep rate, lie between those of the two neighbours in cost."""
    for less, more in pairwise(sorted(measured)):
        if less <= share <= more:
            low, high = measured[less], measured[more]
            weight = (share - less) / (more - less)
            keep = (1 - weight) * low.keep + weight * high.keep
            return At(keep, between(share, (less, low.right), (more, high.right)))
    return None


@cache
def sweep(name: str, folder: Path = RESULTS / "sweeps") -> Sweep:
    """The sweep in a folder of SWEEPS."""
    _, *lines = (folder / name / "points.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "reason" not in record]
    whole = next(record for record in records if record["point"]["reducer"] is None)
    measured: dict[str, dict[float, At]] = {}
    for record in records:
        point = record["point"]
        if point["reducer"] is not None:
            at = At(point["keep"], unpacked(record["correct"], record["samples"])[None])
            measured.setdefault(point["reducer"], {})[record["gmacs"] / whole["gmacs"]] = at
    return Sweep(unpacked(whole["correct"], whole["samples"])[None], measured)


def gap_in_words(first: str, second: str, share: float, sweeps: Sequence[str] = ("shapes", "cifar10")) -> str:
    """How far one reducer lies from another at a share of the multiply-adds, in points, sweep by sweep."""
    said = []
    for name in sweeps:
        sides = [sweep(name).at(reducer, share) for reducer in (first, second)]
        gap = difference(*(side.right for side in sides))
        said.append(f"{points(gap.ends)} points on {SWEEPS[name]}")
    return " and ".join(said)

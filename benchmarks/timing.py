"""Wall-clock measurement: alternating rounds, medians, synchronised where there is a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median duration of each call over ``rounds`` rounds; every round runs all of them in turn.

    Alternating spreads what else the machine does over all calls alike. One more round warms up.
    ValueError: no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in calls.items():
                _synchronise()
                start = time.perf_counter()
                call()
                _synchronise()
                taken[name].append(time.perf_counter() - start)
    return {name: median(durations[1:]) for name, durations in taken.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

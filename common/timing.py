"""Wall-clock measurement: alternating rounds and medians, synchronised with a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call by ``alternate``, without gradients."""
    with torch.no_grad():
        return {name: measured["seconds"] for name, measured in alternate(calls, rounds).items()}


def ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    """The speed of ``fast`` over that of ``slow``: the median of ``rounds_ratio``."""
    return median(rounds_ratio(slow, fast))


def rounds_ratio(slow: dict[str, Any], fast: dict[str, Any]) -> list[float]:
    """The speed of ``fast`` over that of ``slow`` in each round, where both had the same machine load."""
    return [s / f for s, f in zip(slow["rounds"], fast["rounds"], strict=True)]


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, dict[str, Any]]:
    """Each call's durations in ``rounds`` and their median ``seconds``; one round before them warms up.

    Every round runs all calls in turn, so that other load on the machine affects all of them alike. A round's duration
    is the mean of ``repeats`` calls. On CUDA the device is synchronised before and after, and ``peak_bytes`` is the
    call's peak memory; on a CPU it is None.
    ValueError: no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int | None] = dict.fromkeys(calls)
    cuda = torch.cuda.is_available()
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if round_number:
                times[name].append((time.perf_counter() - start) / repeats)
    return {
        name: {"seconds": median(spent), "rounds": spent, "peak_bytes": peaks[name]} for name, spent in times.items()
    }

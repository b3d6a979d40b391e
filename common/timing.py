"""Wall-clock measurement: alternating rounds and medians, synchronised with a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch


class Timed(NamedTuple):
    """The mean seconds of a call, and its peak memory in bytes on CUDA."""

    seconds: float
    peak_bytes: int | None


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
    return take_turns({name: partial(timed, call, repeats) for name, call in calls.items()}, rounds)


def take_turns(turns: Mapping[str, Callable[[], Timed]], rounds: int) -> dict[str, dict[str, Any]]:
    """As ``alternate``, for turns that time themselves, such as those of other processes."""
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    times: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int | None] = dict.fromkeys(turns)
    for round_number in range(rounds + 1):
        for name, turn in turns.items():
            spent, peaks[name] = turn()
            if round_number:
                times[name].append(spent)
    return {
        name: {"seconds": median(spent), "rounds": spent, "peak_bytes": peaks[name]} for name, spent in times.items()
    }


def timed(call: Callable[[], object], repeats: int = 1) -> Timed:
    """One turn of ``alternate``."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize()
    return Timed((time.perf_counter() - start) / repeats, torch.cuda.max_memory_allocated() if cuda else None)

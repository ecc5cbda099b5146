"""Timing of calls that take turns, so that a busy moment hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Call = Callable[[], object]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turns(calls: Mapping[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call, by the wall clock and in processor time (all threads).

    Every call runs once unmeasured, then each in turn, `repeats` times.
    """
    spent: dict[str, dict[str, list[float]]] = {
        name: {clock: [] for clock in CLOCKS} for name in calls
    }
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = {clock: read() for clock, read in CLOCKS.items()}
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                for clock, read in CLOCKS.items():
                    spent[name][clock].append(read() - start[clock])
    return {
        name: {clock: 1e3 * median(times) for clock, times in clocks.items()}
        for name, clocks in spent.items()
    }


def exponents(points: list[dict[str, float]], time_key: str, *sizes: str) -> dict[str, float]:
    """Least-squares fit of `time = c * size_1^a * size_2^b ...`: the power of each size."""
    logs = torch.tensor([[1.0, *(p[s] for s in sizes)] for p in points], dtype=torch.float64).log()
    logs[:, 0] = 1
    times = torch.tensor([p[time_key] for p in points], dtype=torch.float64).log()
    fit = torch.linalg.lstsq(logs, times[:, None], driver="gelsd").solution[1:, 0]
    return {size: round(float(power), 2) for size, power in zip(sizes, fit, strict=True)}


def geometric_mean(values: list[float]) -> float:
    """`exp(mean(log))`."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())

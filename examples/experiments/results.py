"""Results read back: numbers of a run, means over seeds, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from cmg.errors import DataError

from .train import read_result

Result = Mapping[str, Any]  # as `train` writes it
Results = dict[str, dict[int, Result]]  # experiment -> seed -> its result
Score = Callable[[Result, Sequence[str]], float]  # of a result, over some directions


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval (Student's t; NaN for one seed)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a seed."""
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), float("nan"), n)
        spread = float(np.std(values, ddof=1)) / n**0.5
        return cls(float(np.mean(values)), float(student.ppf(0.975, n - 1)) * spread, n)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is on one side of 0, else 0."""
        return int(self.mean - self.half > 0) - int(self.mean + self.half < 0)

    def __format__(self, spec: str) -> str:
        """Such as "0.81 ± 0.02"; the spec is that of each number ("+.2f" signs the mean only)."""
        half = "?" if np.isnan(self.half) else format(self.half, spec.replace("+", ""))
        return f"{format(self.mean, spec)} ± {half}"


def read_results(folder: Path) -> Results:
    """All results in a folder.

    Raises:
        DataError: There are none.
    """
    results: Results = {}
    for path in sorted(folder.glob("*-seed*.json")):
        result = read_result(path)
        name, seed = result["identity"]["name"], result["identity"]["seed"]
        results.setdefault(name, {})[seed] = result
    if not results:
        raise DataError(f"{folder}: holds no results. Hint: run the experiments first.")
    return results


def directions(result: Result) -> tuple[str, ...]:
    """Of a result, "source->target"."""
    return tuple(result["classification"])


def clips(result: Result, ways: Sequence[str]) -> float:
    """Accuracy for clips, the mean of these directions."""
    return float(np.mean([result["classification"][way]["accuracy"] for way in ways]))


def segments(result: Result, ways: Sequence[str]) -> float:
    """F1 of event segments, the mean of these directions."""
    return float(np.mean([result["localization"][way]["segment_f1"] for way in ways]))


def precision(result: Result, ways: Sequence[str]) -> float:
    """Precision of event segments, which the paper calls accuracy."""
    return float(np.mean([result["localization"][way]["precision"] for way in ways]))


def shared_codes(result: Result, ways: Sequence[str] = (), most: float = 0.8) -> float:
    """The part of the codes in use that no modality holds by more than 80 % (Fig. 4, green)."""
    counts = np.array(list(code_counts(result).values()), dtype=float)  # [M, L]
    total = counts.sum(0)
    used = total > 0
    return float((counts[:, used].max(0) <= most * total[used]).mean())


def code_counts(result: Result) -> dict[str, list[int]]:
    """How often each modality chose each code, on held-out clips."""
    return {name: [int(n) for n in x.split()] for name, x in result["codes"]["counts"].items()}


def estimate(runs: Mapping[int, Result], score: Score, ways: Sequence[str]) -> Estimate:
    """A score over the seeds of an experiment."""
    return Estimate.of([score(result, ways) for _, result in sorted(runs.items())])


def contrast(results: Results, weights: Mapping[str, float], score: Score) -> Estimate:
    """A weighted sum of experiments, seed by seed, over the directions that all of them have.

    Args:
        results: Of every experiment in `weights`.
        weights: Experiment -> weight; {"a": 1, "b": -1} is by how much a is better than b.
        score: What to compare.
    """
    runs = {name: results[name] for name in weights}
    seeds = sorted(set.intersection(*(set(x) for x in runs.values())))
    every = [directions(result) for x in runs.values() for result in x.values()]
    ways = [way for way in every[0] if all(way in others for others in every)]
    values = [
        sum(weight * score(runs[name][seed], ways) for name, weight in weights.items())
        for seed in seeds
    ]
    return Estimate.of(values)

"""Read results: scores of a run, means over seeds, and confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from cmg.errors import DataError

from .train import read_result

Result = Mapping[str, Any]  # as written by `train`
Results = dict[str, dict[int, Result]]  # experiment -> seed -> its result
Score = Callable[[Result, Sequence[str]], float]  # score of a result over some directions


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95 % interval (Student's t; NaN for one seed)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value for each seed."""
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), float("nan"), n)
        spread = float(np.std(values, ddof=1)) / n**0.5
        return cls(float(np.mean(values)), float(student.ppf(0.975, n - 1)) * spread, n)

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is on one side of 0, otherwise 0."""
        return int(self.mean - self.half > 0) - int(self.mean + self.half < 0)

    def __format__(self, spec: str) -> str:
        """Format as "0.81 ± 0.02", each number by `spec`; "+.2f" signs only the mean."""
        half = "?" if np.isnan(self.half) else format(self.half, spec.replace("+", ""))
        return f"{format(self.mean, spec)} ± {half}"


def read_results(folder: Path) -> Results:
    """Read all results in a folder.

    Raises:
        DataError: There are no results.
    """
    results: Results = {}
    for path in sorted(folder.glob("*-seed*.json")):
        result = read_result(path)
        name, seed = result["identity"]["name"], result["identity"]["seed"]
        results.setdefault(name, {})[seed] = result
    if not results:
        raise DataError(f"{folder}: has no results. Hint: run the experiments first.")
    return results


def directions(result: Result) -> tuple[str, ...]:
    """The directions "source->target" of a result."""
    return tuple(result["classification"])


def _mean(task: str, score: str) -> Score:
    """The mean of a score over directions."""
    return lambda result, ways: float(np.mean([result[task][way][score] for way in ways]))


clips = _mean("classification", "accuracy")
segments = _mean("localization", "segment_f1")
precision = _mean("localization", "precision")  # the paper calls it accuracy


def shared_codes(result: Result, ways: Sequence[str] = (), most: float = 0.8) -> float:
    """Share of the used codes of which no modality has more than 80 % (green in Fig. 4)."""
    counts = np.array(list(code_counts(result).values()), dtype=float)  # [M, L]
    total = counts.sum(0)
    used = total > 0
    return float((counts[:, used].max(0) <= most * total[used]).mean())


def code_counts(result: Result) -> dict[str, list[int]]:
    """How often each modality chose each code on held-out clips."""
    return {name: [int(n) for n in x.split()] for name, x in result["codes"]["counts"].items()}


def estimate(runs: Mapping[int, Result], score: Score, ways: Sequence[str]) -> Estimate:
    """Estimate a score of an experiment from its seeds."""
    return Estimate.of([score(result, ways) for _, result in sorted(runs.items())])


def contrast(results: Results, weights: Mapping[str, float], score: Score) -> Estimate:
    """Estimate a weighted sum of experiments from common seeds and directions.

    Args:
        results: Results that include every experiment in `weights`.
        weights: Experiment -> weight; {"a": 1, "b": -1} is the difference of a and b.
        score: Score to compare.
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

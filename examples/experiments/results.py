"""Results: one JSON file for each experiment; scores, means over seeds, and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from cmg.digits import VERSION
from cmg.errors import DataError
from cmg.files import write_atomic

from .matrix import CHOICE, EXPERIMENTS, MORE_SEEDS, SEEDS, STRENGTHS, Experiment
from .train import recipe

CODE = 3  # version of encoders, losses and heads; results of another are measured again
NARROW = 0.02  # width of an interval that shows that there is no difference of note

Result = dict[str, Any]  # of an experiment: "identity", "choices" and "runs"
Results = dict[str, Result]  # name of an experiment -> its result
Score = Callable[[Mapping[str, Any], Sequence[str]], float]  # of a run over some directions


def identity(experiment: Experiment) -> dict[str, Any]:
    """The settings of an experiment, stored with its results; with others it is run again."""
    settings = {
        "code": CODE,
        "rendering": VERSION,
        "choice": CHOICE,
        "strengths": STRENGTHS,
        "name": experiment.name,
        "alignment": experiment.alignment,
        "modalities": experiment.modalities,
        "clips": experiment.clips,
        "config": experiment.settings(),
        "recipe": asdict(recipe(experiment)),
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))  # as it is read again
    return found


def read_result(folder: Path, experiment: Experiment) -> Result:
    """Read what there is of an experiment: strength -> score, and seed -> scores.

    Results of other settings do not count, and neither do runs of another strength than the best.

    Raises:
        DataError: The file is not a result.
    """
    path, nothing = folder / f"{experiment.name}.json", {"choices": {}, "runs": {}}
    if not path.is_file():
        return {"identity": identity(experiment), **nothing}
    try:
        result: Result = json.loads(path.read_text())
        if result["identity"] != identity(experiment):
            return {"identity": identity(experiment), **nothing}
        if not all(math.isfinite(score) for score in result["choices"].values()):
            raise ValueError("a choice is not finite")
        if not all({"clips", "segments", "seconds"} <= x.keys() for x in result["runs"].values()):
            raise ValueError("a run is not whole")
        if len(result["choices"]) == len(STRENGTHS):
            found, strength = result["runs"].items(), chosen(result)
            result["runs"] = {seed: x for seed, x in found if x["strength"] == strength}
        return result
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a result, or cut short ({error!r:.80}).") from error


def chosen(result: Result) -> float:
    """The strength with the best score on split 3; the lowest of equal ones."""
    return max(STRENGTHS, key=lambda strength: result["choices"][str(strength)])


def write_result(folder: Path, experiment: Experiment, result: Result) -> None:
    """Write a result atomically, its runs by seed, with numbers rounded to four digits."""
    ordered = {
        **result,
        "choices": dict(sorted(result["choices"].items(), key=lambda x: float(x[0]))),
        "runs": dict(sorted(result["runs"].items(), key=lambda x: int(x[0]))),
    }
    text = json.dumps(_rounded(ordered), indent=1, allow_nan=False)
    write_atomic(folder / f"{experiment.name}.json", (text + "\n").encode())


def read_results(folder: Path) -> Results:
    """Read the results of all experiments that were tested.

    Raises:
        DataError: There are no results.
    """
    every = {name: read_result(folder, experiment) for name, experiment in EXPERIMENTS.items()}
    results = {name: result for name, result in every.items() if result["runs"]}
    if not results:
        raise DataError(f"{folder}: has no results. Hint: run the experiments first.")
    return results


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95% interval (Student's t; NaN for one seed)."""

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
    def verdict(self) -> str:
        """What the interval says of a difference: see `VERDICTS`."""
        if self.mean - self.half > 0:
            return "yes"
        if self.mean + self.half < 0:
            return "no"
        return "equal" if 2 * self.half < NARROW else "open"

    def __format__(self, spec: str) -> str:
        """Format as "0.81 ± 0.02", each number by `spec`; "+.2f" signs only the mean."""
        half = "?" if np.isnan(self.half) else format(self.half, spec.replace("+", ""))
        return f"{format(self.mean, spec)} ± {half}"


VERDICTS = {
    "yes": "the 95% interval of the difference is above 0",
    "no": "it is below 0",
    "equal": f"it contains 0 and is narrower than {NARROW}",
    "open": "it contains 0 and is wider",
}


def directions(result: Result) -> tuple[str, ...]:
    """The directions "source->target" of an experiment."""
    return tuple(next(iter(result["runs"].values()))["clips"])


def _mean(task: str, score: str) -> Score:
    """The mean of a score over directions."""
    return lambda run, ways: float(np.mean([run[task][way][score] for way in ways]))


clips = _mean("clips", "accuracy")
segments = _mean("segments", "segment_f1")
precision = _mean("segments", "precision")  # the paper calls it accuracy
clip_bound = _mean("clips", "upper_bound")


def agreement(run: Mapping[str, Any], ways: Sequence[str]) -> float:
    """The share of segments with the same event in which two modalities have the same code."""
    return float(np.mean([run["agreement"][way] for way in ways]))


def shared(run: Mapping[str, Any], ways: Sequence[str] = ()) -> float:
    """See `train.shared_codes`."""
    return float(run["shared"])


def estimate(result: Result, score: Score, ways: Sequence[str]) -> Estimate:
    """Estimate a score of an experiment from its seeds."""
    return Estimate.of([score(run, ways) for run in result["runs"].values()])


def contrast(
    results: Results,
    weights: Mapping[str, float],
    score: Score,
    seeds: Sequence[int] = (*SEEDS, *MORE_SEEDS),
) -> Estimate:
    """Estimate a weighted sum of experiments from common seeds and directions.

    Args:
        results: Results that include every experiment in `weights`.
        weights: Experiment -> weight; {"a": 1, "b": -1} is the difference of a and b.
        score: Score to compare.
        seeds: The seeds to use, of those that all have.
    """
    common = set.intersection(*(set(results[name]["runs"]) for name in weights))
    every = [directions(results[name]) for name in weights]
    ways = [way for way in every[0] if all(way in others for others in every)]

    def difference(seed: str) -> float:
        runs = {name: results[name]["runs"][seed] for name in weights}
        return sum(weight * score(runs[name], ways) for name, weight in weights.items())

    return Estimate.of([difference(str(seed)) for seed in seeds if str(seed) in common])


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 4)
        case Mapping():
            return {key: _rounded(child) for key, child in value.items()}
        case list() | tuple():
            return [_rounded(child) for child in value]
        case _:
            return value

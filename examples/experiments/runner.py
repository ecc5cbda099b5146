"""Run missing experiments, each in a process; each of its seeds is a run and a JSON file."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

from cmg.errors import DataError
from cmg.files import make_writable

from .matrix import EXPERIMENTS, Experiment, tasks_of
from .train import evaluate_stored, identity, read_result, run_name, train


def pick(names: Sequence[str] | None, scale: float) -> list[Experiment]:
    """The experiments of these names, or all if None.

    Raises:
        DataError: There is no such experiment.
    """
    for name in names or ():
        if name not in EXPERIMENTS:
            known = " ".join(EXPERIMENTS)
            raise DataError(f"--only {name}: no such experiment. Experiments: {known}.")
    return [EXPERIMENTS[name].scaled(scale) for name in names or EXPERIMENTS]


def is_done(experiment: Experiment, seed: int, results: Path) -> bool:
    """Whether there is a result of this run, with the same settings."""
    result = read_result(results / f"{run_name(experiment, seed)}.json")
    return result.get("identity") == identity(experiment, seed)


def missing_runs(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path
) -> dict[Experiment, list[int]]:
    """Experiment -> the seeds that it has no result for."""
    return {e: [seed for seed in seeds if not is_done(e, seed, results)] for e in experiments}


def outlook(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, jobs: int
) -> str:
    """List the missing seeds of every experiment, and estimate the time from the results."""
    missing = missing_runs(experiments, seeds, results)
    lines = [
        f"{e.name:<28}{'seeds ' + ' '.join(map(str, todo)) if todo else 'done'}"
        for e, todo in missing.items()
    ]
    left = sum(e.epochs * len(todo) for e, todo in missing.items())
    said = _counts(missing, seeds)
    found = [read_result(path) for path in results.glob("*-seed*.json")]
    if left and found:
        pace = median(x["seconds"] / x["identity"]["epochs"] for x in found)
        said += (
            f", about {left * pace / 60 / jobs:.0f} min with --jobs {jobs}, by {len(found)} results"
        )
    return "\n".join([*lines, said + (". --run starts them." if left else ".")])


def _counts(missing: Mapping[Experiment, Sequence[int]], seeds: Sequence[int]) -> str:
    total, left = len(missing) * len(seeds), sum(map(len, missing.values()))
    return f"{total - left} of {total} runs are done; {left} to go"


def run_missing(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, runs: Path, jobs: int
) -> None:
    """Train every run without a result, `jobs` experiments at a time.

    Raises:
        DataError: Some experiments failed. All others are done.
    """
    make_writable(results)
    make_writable(runs)
    missing = missing_runs(experiments, seeds, results)
    print(_counts(missing, seeds), flush=True)
    calls = {e.name: (train, e, todo, results, runs) for e, todo in missing.items() if todo}
    _in_processes(calls, jobs)


def evaluate_missing(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, runs: Path, jobs: int
) -> None:
    """Score stored models on the tasks that are missing in their results.

    Raises:
        DataError: Some experiments failed, for example because they have no model.
    """
    calls = {}
    for experiment in experiments:
        wanted = set(tasks_of(experiment))
        paths = {seed: results / f"{run_name(experiment, seed)}.json" for seed in seeds}
        scored = {seed: set(read_result(path).get("tasks", ())) for seed, path in paths.items()}
        if todo := [seed for seed in seeds if not wanted <= scored[seed]]:
            calls[experiment.name] = (evaluate_stored, experiment, todo, results, runs)
    print(f"{len(calls)} of {len(experiments)} experiments have missing tasks", flush=True)
    _in_processes(calls, jobs)


def _in_processes(calls: Mapping[str, tuple[Any, ...]], jobs: int) -> None:
    """Run each call in a new process with one thread, so that results are independent."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, failed = time.monotonic(), []
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(_exit_code, *call): name for name, call in calls.items()}
    try:
        for n, future in enumerate(as_completed(futures), 1):
            name, code = futures[future], future.result()
            failed += [f"{name} (exit code {code})"] if code else []
            minutes = (time.monotonic() - began) / 60
            state = "failed" if code else "done"
            print(f"[{n}/{len(calls)}, {minutes:.0f} min] {name} {state}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise DataError(f"failed, for the reasons above: {', '.join(failed)}")


def _exit_code(function: Callable[..., None], experiment: Experiment, *args: Any) -> int | None:
    process = multiprocessing.get_context("spawn").Process(
        target=_one_line_of, args=(function, experiment, *args)
    )
    process.start()
    process.join()
    return process.exitcode


def _one_line_of(function: Callable[..., None], experiment: Experiment, *args: Any) -> None:
    """Call; if the input or the user is the reason of a failure, exit with one line."""
    try:
        function(experiment, *args)
    except (DataError, OSError) as error:
        sys.exit(f"{experiment.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

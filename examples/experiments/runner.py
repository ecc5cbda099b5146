"""Runs what is missing: an experiment is a process, each of its seeds a run and a JSON file."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cmg.errors import DataError
from cmg.files import make_writable

from .matrix import EXPERIMENTS, Experiment, tasks_of
from .train import evaluate_stored, identity, read_result, run_name, train


def pick(names: Sequence[str] | None, scale: float) -> list[Experiment]:
    """The experiments of these names, or all.

    Raises:
        DataError: There is no such experiment.
    """
    for name in names or ():
        if name not in EXPERIMENTS:
            known = " ".join(EXPERIMENTS)
            raise DataError(f"--only {name}: no such experiment. There are: {known}.")
    return [EXPERIMENTS[name].scaled(scale) for name in names or EXPERIMENTS]


def is_done(experiment: Experiment, seed: int, results: Path) -> bool:
    """Whether this very run has its result."""
    result = read_result(results / f"{run_name(experiment, seed)}.json")
    return result.get("identity") == identity(experiment, seed)


def run_missing(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, runs: Path, jobs: int
) -> None:
    """Train every run without a result, `jobs` experiments at a time.

    Raises:
        DataError: Some experiments failed; the others are done.
    """
    make_writable(results)
    missing = {e: [seed for seed in seeds if not is_done(e, seed, results)] for e in experiments}
    total, left = len(experiments) * len(seeds), sum(map(len, missing.values()))
    print(f"{total - left} of {total} runs are done; {left} to go", flush=True)
    calls = {e.name: (train, e, todo, results, runs) for e, todo in missing.items() if todo}
    _in_processes(calls, jobs)


def evaluate_missing(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, runs: Path, jobs: int
) -> None:
    """Score stored models on the tasks that their results lack.

    Raises:
        DataError: Some experiments failed, for example since there is no model of them.
    """
    calls = {}
    for experiment in experiments:
        wanted = set(tasks_of(experiment))
        paths = {seed: results / f"{run_name(experiment, seed)}.json" for seed in seeds}
        scored = {seed: set(read_result(path).get("tasks", ())) for seed, path in paths.items()}
        if todo := [seed for seed in seeds if not wanted <= scored[seed]]:
            calls[experiment.name] = (evaluate_stored, experiment, todo, results, runs)
    _in_processes(calls, jobs)


def _in_processes(calls: Mapping[str, tuple[Any, ...]], jobs: int) -> None:
    """Each call in a fresh process of one thread: a result does not depend on its neighbours."""
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
        raise DataError(f"failed, tracebacks are above: {', '.join(failed)}")


def _exit_code(function: Callable[..., None], *args: Any) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode

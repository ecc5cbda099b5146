"""Run experiments in parallel processes, and say what is left to run."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from cmg.clips import TEST, VALIDATION
from cmg.errors import DataError
from cmg.files import in_use, make_writable
from cmg.workers import start_worker

from .claims import undecided
from .matrix import CHOICE, EXPERIMENTS, MORE_SEEDS, SEEDS, STRENGTHS, Experiment
from .results import Results, chosen, read_result, read_results, write_result
from .train import measure


class Run(NamedTuple):
    """One training: of an experiment with a strength, on a seed."""

    name: str
    strength: float
    seed: int

    @property
    def choosing(self) -> bool:
        """Whether it is for the choice of the strength, on split 3."""
        return self.seed == CHOICE


def pick(names: Sequence[str] | None) -> list[Experiment]:
    """The experiments of these names, or all if None.

    Raises:
        DataError: There is no such experiment.
    """
    for name in names or ():
        if name not in EXPERIMENTS:
            known = " ".join(EXPERIMENTS)
            raise DataError(f"--only {name}: no such experiment. Experiments: {known}.")
    return [EXPERIMENTS[name] for name in dict.fromkeys(names or EXPERIMENTS)]


def to_choose(experiments: Sequence[Experiment], folder: Path) -> list[Run]:
    """The runs that the choices of these experiments still need."""
    return [
        Run(e.name, strength, CHOICE)
        for strength in STRENGTHS
        for e in experiments
        if str(strength) not in read_result(folder, e)["choices"]
    ]


def to_test(experiments: Sequence[Experiment], seeds: Sequence[int], folder: Path) -> list[Run]:
    """The missing tests of these experiments, with the strengths that were chosen.

    Experiments whose choice is not complete have none.
    """
    results = {e.name: read_result(folder, e) for e in experiments}
    return [
        Run(name, chosen(result), seed)
        for seed in seeds
        for name, result in results.items()
        if len(result["choices"]) == len(STRENGTHS) and str(seed) not in result["runs"]
    ]


def run_missing(experiments: Sequence[Experiment], folder: Path, jobs: int) -> None:
    """Choose, test on the first seeds, then on more seeds where a claim is open.

    Every result is written as soon as it is there, so that the same call continues after an
    interruption.

    Raises:
        DataError: Some runs failed. All others are done.
    """
    make_writable(folder)
    with in_use(folder):
        failed = _in_processes("choosing", to_choose(experiments, folder), folder, jobs)
        failed += _in_processes("testing", to_test(experiments, SEEDS, folder), folder, jobs)
        still = to_extend(experiments, folder)
        failed += _in_processes("open claims", to_test(still, MORE_SEEDS, folder), folder, jobs)
    if failed:
        raise DataError(f"failed, for the reasons above: {', '.join(failed)}")


def to_extend(experiments: Sequence[Experiment], folder: Path) -> list[Experiment]:
    """Those of the experiments that claims are open on after the first seeds."""
    results = {e.name: read_result(folder, e) for e in experiments}
    if not any(result["runs"] for result in results.values()):
        return []
    names = undecided(read_results(folder))
    return [e for e in experiments if e.name in names]


def outlook(experiments: Sequence[Experiment], folder: Path, jobs: int) -> str:
    """What is done and what is left, with an estimate of the time from the results."""
    results: Results = {e.name: read_result(folder, e) for e in experiments}
    lines = [
        f"{name:<28}{len(x['choices'])} of {len(STRENGTHS)} choices, {len(x['runs'])} seeds"
        for name, x in results.items()
    ]
    left = len(to_choose(experiments, folder))
    left += sum(str(seed) not in x["runs"] for x in results.values() for seed in SEEDS)
    said, tested = f"{left} runs to go", any(x["runs"] for x in results.values())
    if not left and tested:
        left = len(to_test(to_extend(experiments, folder), MORE_SEEDS, folder))
        said = f"{left} runs to go, on open claims"
    seconds = [run["seconds"] for x in results.values() for run in x["runs"].values()]
    if left and seconds:
        said += f", about {left * mean(seconds) / 60 / jobs:.0f} min with --jobs {jobs}"
    return "\n".join([*lines, said + (". --run starts them." if left else ".")])


def _in_processes(title: str, runs: Sequence[Run], folder: Path, jobs: int) -> list[str]:
    """Run all in processes of one thread each; the names of those that failed."""
    if not runs:
        return []
    print(f"{title}: {len(runs)} runs", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries that the processes load
    began, failed, done = time.monotonic(), [], 0
    left, flying = deque(runs), dict[Future[dict[str, Any]], Run]()
    with ExitStack() as pools:
        pool = None
        while left or flying:
            pool = pool or pools.enter_context(
                ProcessPoolExecutor(jobs, get_context("spawn"), _start)
            )
            while left and len(flying) < jobs:
                run = left.popleft()
                flying[pool.submit(_measure, run, folder)] = run
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run, state = flying.pop(future), "done"
                done += 1
                try:
                    _keep(run, future.result(), folder)
                except Exception as error:  # whatever stops one run stops no other
                    state = f"failed: {error if isinstance(error, DataError) else repr(error)}"
                    failed.append(f"{run.name} (seed {run.seed})")
                    if isinstance(error, BrokenProcessPool):  # a process was killed
                        pool = None
                print(
                    f"[{done}/{len(runs)}, {(time.monotonic() - began) / 60:.0f} min] {run.name}, "
                    f"strength {run.strength:g}, seed {run.seed}: {state}",
                    flush=True,
                )
    return failed


def _start() -> None:
    start_worker()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted training is of no use
    torch.set_num_threads(1)


def _measure(run: Run, folder: Path) -> dict[str, Any]:
    return measure(*run, VALIDATION if run.choosing else TEST, folder)


def _keep(run: Run, found: dict[str, Any], folder: Path) -> None:
    """Add a finished run to the file of its experiment."""
    experiment = EXPERIMENTS[run.name]
    result = read_result(folder, experiment)
    if run.choosing:
        scores = [x["accuracy"] for x in found["clips"].values()]
        scores += [x["segment_f1"] for x in found["segments"].values()]
        result["choices"][str(run.strength)] = mean(scores)
    else:
        result["runs"][str(run.seed)] = found
    write_result(folder, experiment, result)

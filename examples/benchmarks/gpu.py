"""All that only a GPU can show, in eight minutes: `make gpu`.

    python -m examples.benchmarks.gpu [STAGE ...] [--output FOLDER] [--budget SECONDS] [--quick]

Stages: tests (`pytest -m gpu`), launches, step, search, statistics, update, and sanitizer
(compute-sanitizer over one small run of every operation); figures stands for launches to update.
tiles, which runs only where it is named, times each tile of the search and makes its table.
Each runs in a process of its own and writes one JSON file as it goes. What there was no time for is
listed as left out. Times are those of the GPU alone, by replay of a CUDA graph with an empty L2
cache ("us"), and of calls in a row, which includes the host ("eager us").

The status is 1 if a test or a row of ours fails, a stage breaks off, or the sanitizer finds an
error. `--quick` tries all of it on tiny sizes, without a GPU by the clock of the CPU, into another
folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product as grid
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch
from torch import Tensor

import mmvq
import mmvq_kernels

from . import launches, peers, search, tiles, timing
from .timing import Call, geometric_mean

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "benchmarks" / "gpu"
SECONDS = {  # what a stage may take; what it does not use is left for those after it
    "tests": 140,
    "launches": 40,
    "step": 40,
    "search": 100,
    "statistics": 30,
    "update": 20,
    "sanitizer": 90,
    "tiles": 120,  # only where it is asked for
}
BUDGET = 460  # of all but tiles
FIGURES = ("launches", "step", "search", "statistics", "update")
BYTES_PER_US = 3.35e6  # HBM3 of an H100
AIMS = {  # what is compared with an aim -> the aim
    "eager step over vector-quantize-pytorch": 0.25,
    "us of a step as a CUDA graph": 60.0,
    "update over the time its bytes take": 1.5,
}
SEARCHES = [  # N, L, D: the most telling first, then the rest of the grid
    (1_600, 400, 256),
    (65_536, 1_024, 64),
    (65_536, 8_192, 256),
    (16_384, 8_192, 64),
    (1_000_000, 1_024, 8),
    (1_000_000, 400, 256),
    (65_536, 65_536, 64),
]
SEARCHES += sorted(
    {*grid((1_600, 16_384, 65_536, 1_000_000), (400, 1_024, 8_192, 65_536), (8, 64, 256))}
    - {*SEARCHES},
    key=math.prod,
)
STATISTICS = [  # N, L, D
    (1_600, 400, 256),
    (65_536, 1_024, 256),
    (1_000_000, 1_024, 64),
    (65_536, 65_536, 64),
    (65_536, 8_192, 256),
    (16_384, 400, 256),
    (1_000_000, 400, 8),
]
UPDATES = [
    (400, 256),
    (65_536, 256),
    (8_192, 256),
    (262_144, 64),
    (65_536, 64),
    (65_536, 8),
]  # L, D
LARGEST = 1 << 42  # multiplications of a search
DTYPES = (torch.float32, torch.bfloat16)

# ---- clocks


def by_graph(call: Call, repeats: int = 11) -> float:
    """Microseconds of one replay of a CUDA graph; of one call on a CPU."""
    if not torch.cuda.is_available():
        return 1e6 * median(timing._by_clocks(call, "cpu")["wall"] for _ in range(3))
    graph = timing.capture(call)
    timing._by_the_gpu(graph)
    return 1e6 * median(timing._by_the_gpu(graph) for _ in range(repeats))


def eager(call: Call, seconds: float = 0.1) -> float:
    """Microseconds of each of many calls in a row, for about `seconds`."""

    def spent(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        spent(1)
    calls = max(3, min(100, int(seconds / 3 / spent(1))))
    return 1e6 * median(spent(calls) / calls for _ in range(3))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- the files


def about() -> dict[str, Any]:
    """The device, its driver and the versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "numpy", "vector-quantize-pytorch")},
        "mmvq": mmvq.__version__,
        "backends": mmvq_kernels.available_backends(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(ask[0]) is None:
        return None
    done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.stdout else None


class File:
    """A JSON file that is written again after each row, and printed row by row."""

    def __init__(self, path: Path, until: float = math.inf) -> None:
        self.path, self.until = path, until
        self.content: dict[str, Any] = {**about(), "left out": [], "rows": []}
        self.failed: list[str] = []  # rows of our own with an error
        self.write()

    def write(self) -> None:
        """Write all of it; a reader never sees a part."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.path)

    def late(self, *names: str) -> bool:
        """Whether there is no time left for these, which are then listed as left out."""
        if time.time() < self.until:
            return False
        self.content["left out"] += names
        self.write()
        return True

    def row(
        self, measure: Callable[[], dict[str, Any]], *, peer: bool = False, **what: Any
    ) -> None:
        """Measure one row, unless it is late. An error is written in its place.

        An error of ours fails the stage in the end; a peer may not know a dtype or a size.
        """
        name = ", ".join(str(value) for value in what.values())
        if self.late(name):
            return
        try:
            found = {k: round(x, 4) if type(x) is float else x for k, x in measure().items()}
        except Exception as error:  # of any kind: the other rows are worth having all the same
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
            self.failed += [] if peer else [name]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.content["rows"].append({**what, **found})
        print(f"{name}: {found}", flush=True)
        self.write()

    def found(self, key: str, **what: Any) -> list[float]:
        """The values of a key in the rows that hold `what`."""
        rows = [r for r in self.content["rows"] if what.items() <= r.items()]
        return [r[key] for r in rows if key in r]


def times(call: Call, moved: int | None = None) -> dict[str, Any]:
    """The two times of a call, and the first over the time that the bytes `moved` take."""
    us = by_graph(call)
    bound = {} if moved is None else {"over its bytes": us * BYTES_PER_US / moved}
    return {"us": us, "eager us": eager(call), **bound}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the figures


def figure_launches(file: File, device: str, quick: bool) -> None:
    """The launches of every operation; on a GPU as the profiler counts them."""
    if importlib.util.find_spec("triton") is None:
        file.content["left out"].append("all: triton is not installed")
        return
    found = launches.report()
    file.content |= {**launches.as_json(found), "above the limit": launches.above_limit(found)}
    del file.content["rows"]
    shown = ("step", "search", "statistics", "eval", "matching", launches.THEIRS)
    print({name: file.content[name] for name in shown}, "above:", file.content["above the limit"])


def figure_step(file: File, device: str, quick: bool) -> None:
    """A training step, forward and backward with gradients from a decoder, and its parts."""

    def whole(case: launches.Case) -> Call:
        phases = case(device).values()
        return lambda: [run() for run in phases]

    def also_as_graph(name: str, case: launches.Case) -> None:
        run = whole(case)
        file.row(lambda: {"us": eager(run)}, what=name, way="eager")
        file.row(lambda: {"us": by_graph(run)}, what=name, way="CUDA graph")

    cases = launches.CASES
    also_as_graph("step", cases["step, loss and quantized"])
    if peers.find(launches.THEIRS):
        run = whole(launches.theirs)  # it waits for the device, so that no graph can hold it
        file.row(lambda: {"us": eager(run)}, peer=True, what="step", way=launches.THEIRS)
    else:
        file.content["left out"].append(f"{launches.THEIRS}: not installed")
    summary: dict[str, float] = {}
    mine, theirs = (file.found("us", what="step", way=w) for w in ("eager", launches.THEIRS))
    if mine and theirs:
        summary["eager step over vector-quantize-pytorch"] = round(mine[0] / theirs[0], 3)
    if graph := file.found("us", what="step", way="CUDA graph"):
        summary["us of a step as a CUDA graph"] = graph[0]
    file.content["aims"] = compare_with_aims(summary)
    for name in ("eval", "matching", "step, masks", "step, aligned", "step, three modalities"):
        also_as_graph(name, cases[name])
    for name in ("step", "step, bfloat16", "step, rotation, loss and quantized"):
        also_as_graph(f"{name}, loss alone" if name == "step" else name, cases[name])


def compare_with_aims(found: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Print each value beside its aim."""
    lines = {
        name: {"value": value, "aim": AIMS[name], "reached": value <= AIMS[name]}
        for name, value in found.items()
    }
    for name, line in lines.items():
        print(f"{name}: {line['value']:g}, aim {line['aim']:g}", flush=True)
    return lines


def figure_search(file: File, device: str, quick: bool) -> None:
    """The search and its alternatives, by size and dtype."""
    sizes = [(96, 40, 16), (200, 70, 8)] if quick else SEARCHES
    for (N, L, D), dtype in grid(sizes, DTYPES):
        if N * L * D > LARGEST:
            file.content["left out"].append(f"{N}, {L}, {D}: too large")
        elif not file.late(f"{N}, {L}, {D}, {_name(dtype)}"):
            _search(file, N, L, D, dtype, device)
    file.content["mmvq, exact, over"] = relative(file.content["rows"])
    print("mmvq, exact, over", file.content["mmvq, exact, over"])


def _search(file: File, N: int, L: int, D: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=generator, device=device).to(dtype)
    codebook = torch.randn(L, D, generator=generator, device=device)
    ways: dict[str, peers.Search] = {
        "mmvq, exact": mmvq_kernels.nearest_code,
        "mmvq, fast": partial(mmvq_kernels.nearest_code, precision="fast"),
        **peers.searches(x, codebook),
        **peers.approximate_searches(x, codebook),
    }
    some = torch.arange(0, N, max(1, N // 2_000), device=device)
    least = search.least_distance(x[some], codebook)

    def measure(way: peers.Search) -> dict[str, Any]:
        index = torch.as_tensor(way(x, codebook)).to(device).long()[some]
        share = farther(x[some], codebook, index, least)
        found = times(lambda: way(x, codebook))
        return {**found, "Tflop/s": 2e-6 * N * L * D / found["us"], "farther": share}

    for name, way in ways.items():
        what = {"N": N, "L": L, "D": D, "dtype": _name(dtype), "way": name}
        file.row(partial(measure, way), peer=not name.startswith("mmvq"), **what)


def farther(x: Tensor, codebook: Tensor, index: Tensor, least: Tensor) -> float:
    """The share of rows whose code is farther than the nearest by more than rounding."""
    size = x.double().square().sum(1) + codebook.double().square().sum(1).max()
    slack = 4 * x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * size
    wrong = search._distances(x, codebook, index) > least + slack
    return round(float(wrong.double().mean()), 5)


def relative(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The times of the exact search relative to each way: mean, least and greatest, by dtype."""
    ours: dict[tuple[Any, ...], float] = {}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        size = tuple(row[key] for key in ("N", "L", "D", "dtype"))
        if row["way"] == "mmvq, exact" and "us" in row:
            ours[size] = row["us"]
        elif "us" in row and size in ours:
            ratios.setdefault(f"{row['way']}, {row['dtype']}", []).append(ours[size] / row["us"])
    return {
        name: {
            "mean": round(geometric_mean(found), 3),
            "least": round(min(found), 3),
            "greatest": round(max(found), 3),
            "sizes": len(found),
        }
        for name, found in ratios.items()
    }


def figure_statistics(file: File, device: str, quick: bool) -> None:
    """Counts and sums of two groups, and the same by float atomics of torch."""
    for (N, L, D), dtype in grid([(96, 40, 16)] if quick else STATISTICS, DTYPES):
        if not file.late(f"{N}, {L}, {D}, {_name(dtype)}"):
            _statistics(file, N, L, D, dtype, device)


def _statistics(file: File, N: int, L: int, D: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(N, D, device=device).to(dtype)
    index = torch.randint(L, (N,), device=device)
    groups = (torch.arange(N, device=device) * 2).div(N, rounding_mode="floor")
    ones = torch.ones(N, device=device)
    ours = partial(mmvq_kernels.code_statistics, x, index, L, groups=groups, num_groups=2)

    def theirs() -> object:
        sums = torch.zeros(L, D, device=device).index_add_(0, index, x.float())
        return sums, torch.zeros(2 * L, device=device).index_add_(0, groups * L + index, ones)

    moved = N * D * x.element_size() + 16 * N + 4 * L * (D + 2)
    ways: dict[str, Call] = {
        "mmvq": ours,
        "mmvq, atomics": partial(ours, deterministic=False),
        "index_add_": theirs,
    }
    for name, way in ways.items():
        what = {"N": N, "L": L, "D": D, "dtype": _name(dtype), "way": name}
        file.row(partial(times, way, moved), peer=not name.startswith("mmvq"), **what)


def figure_update(file: File, device: str, quick: bool) -> None:
    """The moving average, with and without a reset of one code in a hundred."""
    for (L, D), reset in grid([(40, 16)] if quick else UPDATES, (False, True)):
        if not file.late(f"{L}, {D}, {reset}"):
            _update(file, L, D, reset, device)
    done = [row for row in file.content["rows"] if "us" in row]
    if done:  # the largest: a small one takes as long as a launch
        largest = max(done, key=lambda row: (row["L"] * row["D"], row["reset"]))
        found = {"update over the time its bytes take": largest["over its bytes"]}
        file.content["aims"] = compare_with_aims(found)


def _update(file: File, L: int, D: int, reset: bool, device: str) -> None:
    codes, sums, batch, new = (torch.randn(L, D, device=device) for _ in range(4))
    counts, n = torch.ones(L, device=device), torch.ones(L, device=device)
    dead = torch.arange(L, device=device) % 100 == 1
    given: dict[str, Any] = {"dead": dead, "replacement": new} if reset else {}
    call = partial(mmvq_kernels.ema_update_, codes, sums, counts, batch, n, decay=0.99, **given)
    # sums are read and written, codes written; those of the batch and of the dead are read
    moved = 4 * (4 * L * D + 3 * L) + reset * (L + 4 * D * int(dead.sum()))
    file.row(partial(times, call, moved), L=L, D=D, reset=reset)


def figure_tiles(file: File, device: str, quick: bool) -> None:
    """Each tile of the search, and the table of this GPU (`benchmarks.tiles`)."""
    from mmvq_kernels.gpu import launching

    tiles.measure(lambda one, what: file.row(one, **what), times, device, quick)
    name = launching.name(torch.empty(0, device=device))
    file.content["FACTORS"] = {name: tiles.factors(file.content["rows"])}
    print(f"FACTORS = {file.content['FACTORS']}")


FUNCTIONS: dict[str, Callable[[File, str, bool], None]] = {
    "launches": figure_launches,
    "step": figure_step,
    "search": figure_search,
    "statistics": figure_statistics,
    "update": figure_update,
    "tiles": figure_tiles,
}


def run_figure(name: str, output: Path, until: float, quick: bool) -> None:
    """One figure, in this process."""
    torch.manual_seed(0)
    file = File(output / f"{name}.json", until)
    FUNCTIONS[name](file, "cuda" if torch.cuda.is_available() else "cpu", quick)
    file.write()
    if left := file.content["left out"]:
        print(f"left out: {'; '.join(left)}")
    if file.failed:
        sys.exit(f"failed: {'; '.join(file.failed)}")


# ---- the sanitizer

RAN = "every operation ran"
KILLED = -signal.SIGKILL


def run_every_operation(device: str) -> None:
    """One small run of every operation and kernel: what compute-sanitizer watches."""
    from mmvq_kernels.gpu import launching

    torch.manual_seed(0)
    for processors in (132, 1):  # work in parts, and whole
        with patch.object(launching, "processors", return_value=processors):
            for N, L, D in ((257, 131, 24), (130, 65, 16)):
                run_operations(N, L, D, device)
    run_modules(device)
    _synchronize()
    print(RAN)


def run_operations(N: int, L: int, D: int, device: str) -> None:
    """The operations of mmvq_kernels."""
    x, e = torch.randn(N, D, device=device), torch.randn(L, D, device=device)
    groups = torch.arange(N, device=device) % 2
    for rows in (x, x.bfloat16()):
        index = mmvq_kernels.nearest_code(rows, e, precision="fast")
        index = mmvq_kernels.nearest_code(rows, e)
        for deterministic in (True, False):
            counts, sums = mmvq_kernels.code_statistics(
                rows, index, L, groups=groups, num_groups=2, deterministic=deterministic
            )
    n = counts.sum(0)
    resets: tuple[dict[str, Any], ...] = {}, {"dead": n == 0, "replacement": torch.randn_like(e)}
    for given in resets:
        state = e.clone(), e.clone(), torch.ones(L, device=device)
        mmvq_kernels.ema_update_(*state, sums, n, decay=0.9, **given)
    clips, codes = x[: N // 5 * 5].view(-1, 5, D).clone().requires_grad_(), e.requires_grad_()
    mask = torch.arange(5, device=device) < 1 + torch.arange(len(clips), device=device)[:, None] % 5
    for valid in (None, mask):
        mmvq_kernels.code_log_probabilities(clips, codes, valid).sum().backward()


def run_modules(device: str) -> None:
    """A training step of each kind, an inference step, and the losses."""
    z = {m: torch.randn(6, 5, 24, device=device, requires_grad=True) for m in ("audio", "video")}
    masks = {m: torch.rand(6, 5, device=device) < 0.7 for m in z}
    kinds: tuple[dict[str, Any], ...] = (
        {"partner": "attention"},
        {"partner": "aligned", "gradient": "rotation"},
        {"partner": "none"},
    )
    for kind in kinds:
        quantizer = mmvq.MultiModalEMAQuantizer(
            24, 40, tuple(z), init="uniform", reset_after=1, **kind
        ).to(device)
        for given in (None, masks):
            quantized, _, loss = quantizer(z, given)
            (loss + sum(q.sum() for q in quantized.values())).backward()
    with torch.no_grad():
        quantizer.eval()(z, masks)
    mmvq.CrossModalCodeMatchingLoss()(z, quantizer.codebook, masks).backward()


def run_sanitizer(output: Path, until: float) -> bool:
    """Run memcheck and racecheck over `run_every_operation`; whether neither found an error."""
    file, tool = File(output / "sanitizer.json", until), shutil.which("compute-sanitizer")
    if tool is None:
        file.content["left out"].append("all: compute-sanitizer is not on the path")
        file.write()
        print(file.content["left out"][0])
        return True
    operations = [sys.executable, "-m", "examples.benchmarks.gpu", "--one", "every-operation"]
    # without a cache, or a read past one tensor lands in another
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(*before: str) -> dict[str, Any]:
        start = time.time()
        status, said = run_apart([*before, *operations], until, env=env)
        found: dict[str, Any] = {"status": status, "ended": RAN in said}
        found["summary"] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        found["sound"] = status == 0 and found["ended"] and bool(found["summary"] or not before)
        if not found["sound"]:
            found["said"] = said[-4000:]
        return {**found, "seconds": round(time.time() - start)}

    file.row(run, tool="none")  # compiles the kernels
    for name in ("memcheck", "racecheck"):
        check = (tool, "--tool", name, "--print-limit", "20", "--error-exitcode", "9")
        file.row(partial(run, *check), tool=name)
    killed = [row["tool"] for row in file.content["rows"] if row.get("status") == KILLED]
    file.content["left out"] += killed
    file.write()
    rows = [row for row in file.content["rows"] if row["tool"] not in killed]
    return all(row.get("sound", False) for row in rows)


# ---- the tests


def run_tests(output: Path, until: float, workers: int) -> bool:
    """`pytest -m gpu`; whether it passed."""
    file = File(output / "tests.json")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-rfE"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", f"--junitxml={report}"]
        if workers > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        status, said = run_apart(command, until)
        print(said[-6000:], flush=True)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    counts, rows = dict.fromkeys(("passed", "failed", "skipped"), 0), []
    for case in cases:
        outcome = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            counts["passed"] += 1
        elif outcome.tag == "skipped":
            counts["skipped"] += 1
        else:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            rows.append({"test": name, "said": (outcome.text or "")[-2000:]})
    file.content |= {**counts, "status": status, "seconds": round(time.time() - start)}
    file.content["rows"] = rows
    if not cases:
        file.content["said"] = said[-4000:]
    file.write()
    return status in (0, 5) and counts["failed"] == 0  # 5: nothing was selected


# ---- all of it


def run_apart(
    command: Sequence[str], until: float, *, env: dict[str, str] | None = None, show: bool = False
) -> tuple[int, str]:
    """Status and output of a process of its own, which ends with its children when time is up."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return KILLED, (said or "") + "\nno time was left: ended"
    return process.returncode, said or ""


def run_stages(stages: Sequence[str], output: Path, budget: float, quick: bool) -> list[str]:
    """Run each stage in the time that is its own; the names of those that failed."""
    began, failed = time.time(), []
    until, share = began, budget / sum(SECONDS[stage] for stage in stages)
    for stage in stages:
        until += min(share, 4) * SECONDS[stage]  # one alone need not take all of it
        print(
            f"\n=== {stage}: until {until - began:.0f} s, now {time.time() - began:.0f} s",
            flush=True,
        )
        if stage == "tests":
            fine = run_tests(output, until, workers=1 if quick else 8)
        elif stage == "sanitizer":
            fine = run_sanitizer(output, until)
        else:
            command = [sys.executable, "-m", "examples.benchmarks.gpu", "--one", stage]
            command += ["--output", str(output), "--until", str(until - 3)]
            status, _ = run_apart(command + ["--quick"] * quick, until + 20, show=True)
            fine = status == 0
        if not fine:
            failed.append(stage)
    print(f"\n{time.time() - began:.0f} s, in {output}; failed: {', '.join(failed) or 'none'}")
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages."""
    summary = (__doc__ or "").split("\n\n", 2)[2]
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmarks.gpu",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*SECONDS, "figures"]
    parser.add_argument(
        "stages", nargs="*", help=f"of {', '.join(known)}; all but tiles by default"
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder, {OUTPUT.relative_to(ROOT)} by default"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds, 460 by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; a GPU is not needed")
    parser.add_argument("--one", choices=(*FUNCTIONS, "every-operation"), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(known):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}")
    if not (torch.cuda.is_available() or options.quick or options.one):
        sys.exit("gpu: torch sees no GPU; nothing was run")
    if options.one == "every-operation":
        return run_every_operation("cuda" if torch.cuda.is_available() else "cpu")
    output = options.output or (Path(tempfile.mkdtemp()) if options.quick else OUTPUT)
    if output.exists() and not output.is_dir():
        parser.error(f"--output {output}: must be a folder")
    output.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    os.environ.pop("TRITON_INTERPRET", None)
    if options.one:
        return run_figure(options.one, output, options.until, options.quick)
    chosen = options.stages or [s for s in SECONDS if s != "tiles"]
    stages = [s for s in SECONDS if s in chosen or (s in FIGURES and "figures" in chosen)]
    if run_stages(stages, output, options.budget, options.quick):
        sys.exit(1)


if __name__ == "__main__":
    main()

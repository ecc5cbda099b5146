"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmvq
import mmvq_kernels

from . import data, losses, memory, peers, plot, search, step

PARTS = ("search", "step", "losses", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, print their tables, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmarks",
        description="Speed and memory of mmvq and its alternatives. Takes some minutes.",
    )
    parser.add_argument(
        "parts",
        nargs="*",
        help=f"of {', '.join(PARTS)}, data, gpu; default: all but data (training from disk) and "
        "gpu. Or plot: draw the figures in docs; or launches: count the kernels that a GPU would "
        "start, as one JSON object",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="1 by default")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each call, 5 by default")
    parser.add_argument(
        "--largest",
        type=int,
        default=1 << 35,
        help="skip searches with more multiplications, 2**35 by default; the largest has 2**40",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="clock of the tables; cpu is for one thread on a shared machine",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if parts == ["plot"]:
        plot.draw(json.loads(plot.FIGURES.read_text()), plot.IMAGE)
        return print(f"wrote {plot.IMAGE}")
    if parts == ["launches"]:
        return _print_launches(options.output)
    if alone := {"plot", "launches"} & {*parts}:
        parser.error(f"{alone.pop()} runs alone")
    if unknown := set(parts) - {*PARTS, "data", "gpu"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    if min(*options.threads, options.repeats) < 1:
        parser.error("--threads and --repeats must be at least 1")
    if options.output and (options.output.is_dir() or not options.output.parent.is_dir()):
        parser.error(f"--output {options.output}: must be a file in an existing folder")
    for name in peers.missing():
        print(f"{name} is left out: not installed (pip install 'mmvq[bench]')")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "mmvq": mmvq.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "clock of the tables": options.clock,
        "runs": [],
    }
    try:
        for threads in options.threads:
            peers.use_threads(threads)
            for part in parts:
                results["runs"].append(_run(part, threads, options))
                if options.output:
                    options.output.write_text(json.dumps(results, indent=1) + "\n")
    except search.DisagreementError as error:
        sys.exit(f"no times are shown, because the results disagree: {error}")


def _print_launches(output: Path | None) -> None:
    if importlib.util.find_spec("triton") is None:
        sys.exit("launches: triton is not installed (pip install 'mmvq[triton]')")
    from . import launches

    with contextlib.redirect_stdout(sys.stderr):
        found = launches.as_json(launches.report())
    text = json.dumps(found, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


def _run(part: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    quick, clock = options.quick, "gpu" if part == "gpu" else options.clock
    found: dict[str, Any] = {"part": part, "threads": threads}
    if part == "gpu" and not torch.cuda.is_available():
        print("gpu: torch finds no GPU; nothing was run")
        return found
    units = {"memory": "", "data": " for each process, medians in ms per clip"}
    unit = units.get(part, f", medians in ms ({clock} clock)")
    print(f"\n{part}, {threads} thread{'s' * (threads > 1)}{unit}", flush=True)
    sizes = {"quick": quick, "repeats": options.repeats}
    if part == "search":
        rows = search.run(**sizes, largest=options.largest)
        found["summary"] = search.summary(rows, clock)
    elif part == "step":
        rows = step.run(quick=quick, repeats=6 * options.repeats)
    elif part == "losses":
        rows = losses.run(**sizes)
        found["summary"] = losses.summary(rows, clock)
    elif part == "memory":
        rows = memory.run(quick=quick, threads=threads)
    elif part == "data":
        rows, found["epochs"] = data.run(**sizes, threads=threads)
    else:
        found["device"] = torch.cuda.get_device_name()
        found["backends"] = mmvq_kernels.available_backends()
        print(f"gpu: {found['device']}, mmvq by {found['backends'][0]}")
        rows = search.run(**sizes, largest=options.largest, device="cuda")
        found["summary"] = search.summary(rows, clock)
        rows += step.run(quick=quick, repeats=6 * options.repeats, device="cuda")
    print(table(rows, clock))
    if part == "data":
        print(f"\nwhole epochs on one process\n{table(found['epochs'], clock)}")
    for name, value in found.get("summary", {}).items():
        print(f"{name}: {value}")
    return {**found, "rows": rows}


def table(rows: list[dict[str, Any]], clock: str) -> str:
    """A Markdown table: milliseconds of mmvq, and its time relative to each alternative.

    In brackets the error of the one or the other, where it was measured.
    """
    lines: list[list[str]] = []
    peers_seen = dict.fromkeys(n for row in rows for n in row.get("ms", {}) if n != "mmvq")
    keys = dict.fromkeys(k for row in rows for k in row if k not in ("ms", "repeats", "ulp"))
    timed = any("ms" in row for row in rows)
    lines.append([*keys, *(["mmvq, ms"] * timed), *(f"over {name}" for name in peers_seen)])
    words = [isinstance(rows[0].get(key), str) for key in keys]
    lines.append(["---" if n < len(words) and words[n] else "---:" for n in range(len(lines[0]))])
    for row in rows:
        cells = [_cell(row.get(key, "")) for key in keys]
        if timed:
            ms = row["ms"]
            errors = {name: f" ({ulp:.3g})" for name, ulp in row.get("ulp", {}).items()}
            cells.append(f"{ms['mmvq'][clock]:,.2f}{errors.get('mmvq', '')}")
            for name in peers_seen:
                ratio = ""
                if clock in ms.get(name, {}):
                    ratio = f"{ms['mmvq'][clock] / ms[name][clock]:.2f}{errors.get(name, '')}"
                cells.append(ratio)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

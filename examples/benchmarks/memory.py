"""Additional peak memory of each case, measured in a new process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mmvq_kernels

from . import losses, peers

ROOT = Path(__file__).parents[2]


def case_search(peer: str, N: int, L: int, D: int) -> int:
    """Bytes of a search, without its inputs and outputs."""
    x, codebook = torch.rand(N, D), torch.rand(L, D)
    searches = {"mmvq": mmvq_kernels.nearest_code, **peers.searches(x, codebook)}
    searches[peer](x[:64], codebook[:64])
    before = peak()
    index = torch.as_tensor(searches[peer](x, codebook))
    return peak() - before - index.numel() * index.element_size()


def case_matching(L: int) -> int:
    """Bytes of code matching forward and backward, without its inputs."""
    losses.matching(16)()
    call = losses.matching(L)
    before = peak()
    call()
    return peak() - before


def peak() -> int:
    """Peak memory of this process in bytes (Linux; a child would inherit `ru_maxrss`)."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


def run(*, quick: bool = False, threads: int = 1) -> list[dict[str, Any]]:
    """One row for each case."""
    N, L, D = (4_096, 1_024, 64) if quick else (65_536, 16_384, 64)
    cases: list[tuple[str, list[Any]]] = [("search", ["mmvq", N, L, D])]
    if peers.find("faiss"):
        cases.append(("search", ["faiss", N, L, D]))
    cases.append(("matching", [1_024 if quick else 65_536]))
    rows = []
    for name, args in cases:
        command = "import sys, json; from examples.benchmarks import memory, peers; "
        command += "kind, args, threads = json.loads(sys.argv[1]); peers.use_threads(threads); "
        command += "print(getattr(memory, 'case_' + kind)(*args))"
        text = json.dumps([name, args, threads])
        out = subprocess.check_output([sys.executable, "-c", command, text], cwd=ROOT)
        rows.append({"case": name, "args": args, "MB": round(int(out) / 2**20, 1)})
    return rows

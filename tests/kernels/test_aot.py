"""Every kernel, compiled for four GPUs that are not here, in a process of its own.

REGISTERS may differ from the committed table by 16, two of the steps in which they are handed out:
a patch of ptxas moves them that much; shared memory follows from the tiles and may not differ.
After a change of the kernels: python -m mmvq_kernels.aot --table > tests/kernels/aot_resources.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmvq_kernels.aot import Outcome, violations

COMMITTED = json.loads((Path(__file__).parent / "aot_resources.json").read_text())
REGISTERS = 16


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def aot(option: str, cache: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmvq_kernels.aot", option]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_every_kernel_compiles_to_what_it_should(tmp_path: Path) -> None:
    ((version, found),) = json.loads(aot("--table", tmp_path)).items()
    assert len(found) > 50
    if version not in COMMITTED:
        pytest.skip(f"no violation; no table of resources for triton {version} to compare with")
    assert found.keys() == COMMITTED[version].keys()
    for key, (registers, shared) in COMMITTED[version].items():
        assert abs(found[key][0] - registers) <= REGISTERS, key
        assert found[key][1] == shared, key


@needs_triton
def test_the_roofline_covers_every_size(tmp_path: Path) -> None:
    header, _, *rows = aot("--report", tmp_path).splitlines()
    assert len(rows) == 24
    assert all(row.count("|") == header.count("|") for row in rows)
    # 65,536 rows of 256: 512 blocks of 128; three products of 2 * 65,536 * 1,024 * 256 operations
    (row,) = [row for row in rows if row.startswith("| 65,536 | 1,024 | 256 |")]
    assert row.split(" | ")[3] == "512"
    assert row.split(" | ")[6] == "103.1"


def test_what_counts_as_a_violation() -> None:
    good = Outcome(
        kernel="search_kernel",
        target="sm_90",
        precision="tf32x3",
        atomics_allowed=True,
        aligned=True,
        registers=100,
        spills=0,
        shared=1 << 10,
        warps=4,
        warps_resident=16,
        matrix=True,
        wide=True,
        trap=False,
        atomics=("atom.global.gpu.relaxed.min.s64",),
    )
    assert violations(good) == []
    assert violations(replace(good, spills=8)) == ["spills 8"]
    assert violations(replace(good, shared=1 << 18)) == ["262144 bytes of shared memory"]
    assert violations(replace(good, warps_resident=4)) == ["4 warps on a multiprocessor"]
    assert violations(replace(good, matrix=False)) == ["no tf32x3 matrix instruction"]
    assert violations(replace(good, wide=False)) == ["no 16-byte access"]
    assert violations(replace(good, wide=False, aligned=False)) == []
    assert violations(replace(good, trap=True)) == ["a trap"]
    add = ("atom.global.gpu.relaxed.add.f32",)
    assert violations(replace(good, atomics=add)) == [f"atomics {list(add)}"]
    assert violations(replace(good, atomics_allowed=False)) == [f"atomics {list(good.atomics)}"]

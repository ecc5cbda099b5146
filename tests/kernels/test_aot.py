"""Every kernel, compiled for four GPUs that are not here, in a process of its own.

REGISTERS may differ from the committed table by 16, two of the steps in which they are handed out:
a patch of ptxas moves them that much; shared memory follows from the tiles and may not differ.
Instructions for a multiply-add may not be more than INSTRUCTIONS times those of the table.
After a change of the kernels, paste what --report prints into docs/kernels.md, and
PYTHONPATH=.:tests python -m kernels.audit.aot --table > tests/kernels/aot_resources.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from kernels.audit import workloads
from kernels.audit.aot import TARGETS, Outcome, markdown, violations
from kernels.audit.loops import Loop, loops
from kernels.audit.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads((ROOT / "tests/kernels/aot_resources.json").read_text())
REGISTERS, INSTRUCTIONS = 16, 1.1


def has_triton() -> bool:
    """Of a release that takes what it compiles as this audit gives it."""
    found = importlib.util.find_spec("triton") is not None
    return found and not version("triton").startswith("3.2.")


needs_triton = pytest.mark.skipif(not has_triton(), reason="no triton from 3.3")


@needs_triton
def test_every_kernel_compiles_to_what_it_should(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": ".:tests"}
    command = [sys.executable, "-m", "kernels.audit.aot", "--table"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr
    ((release, found),) = json.loads(done.stdout).items()
    assert len(found) > 50
    wrong = done.stderr.splitlines()
    if release not in COMMITTED:  # its compiler may spill, which costs time, where ours does not
        assert [line for line in wrong if not re.search(r": spills \d+$", line)] == []
        pytest.skip(f"{wrong}; no table of resources for triton {release} to compare with")
    assert wrong == []
    assert found.keys() == COMMITTED[release].keys()
    for key, (registers, shared, _, *counts) in COMMITTED[release].items():
        assert abs(found[key][0] - registers) <= REGISTERS, key
        assert found[key][1] == shared, key
        for mine, committed in zip(found[key][3:], counts, strict=True):
            assert mine <= INSTRUCTIONS * committed, key


def test_every_kernel_workload_and_target_has_its_resources() -> None:
    """In the committed table, and as the documents show it; the audit compares it with the code."""
    (numbers,) = COMMITTED.values()
    kernels = set()
    for target in TARGETS:
        keys = [key.split("/") for key in numbers if key.endswith(f"/{target}")]
        assert {workload for workload, _, _ in keys} == set(WORKLOADS)
        kernels.add(frozenset(kernel.removesuffix(", codes") for _, kernel, _ in keys))
    (names,) = kernels
    sources = "".join(path.read_text() for path in (ROOT / "mmvq_kernels/gpu").glob("*.py"))
    assert names == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert markdown(numbers) in (ROOT / "docs/kernels.md").read_text()


@needs_triton
def test_the_documents_show_the_roofline() -> None:
    from kernels.audit import roofline

    if version("triton") not in COMMITTED or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("its instructions were counted with another triton")
    if f"torch=={torch.__version__.split('+')[0]}" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("the calls of torch were counted with the version of constraints.txt")
    assert roofline.report() in (ROOT / "docs/kernels.md").read_text()
    # 65,536 rows of 256: 512 blocks of 128; three products of 2 * 65,536 * 1,024 * 256 operations
    found = roofline.row("search", 65536, 1024, 256)
    assert found["programs"] == (65536 + 1024) // 8  # of `prepare`
    assert found["Gflop"] == 3 * 2 * 65536 * 1024 * 256 / 1e9
    # each block reads the two parts of all codes, and of its own vectors for each of the 8 tiles;
    # `prepare` reads vectors and codes, and writes two parts, a scale and half-norms
    search = 4 * 256 * (512 * 1024 + 512 * 8 * 128)
    prepare = 4 * (65536 + 1024) * (2 * 256 + 1) + 4 * 1024
    assert found["L2 MB"] == round((search + prepare) / 1e6)
    assert found["least MB"] < found["MB"] < found["unfused MB"]
    # three products for each of the 8 tiles of a block and 4 steps of D; the minimum of each tile
    launches = workloads.record(workloads.WORKLOADS["nearest"])
    whole = roofline.cost(launches[-1])
    (loop,) = roofline.examine(launches[-1], "sm_90").loops
    assert whole.work == found["Gflop"] * 1e9
    assert 300 < loop.skipped < 500
    assert whole.issued == 512 * 8 * 8 * (4 * loop.instructions - 3 * loop.skipped)
    # no product is made by two groups of warps, as where eight of them have a tile of 64 rows
    for launch in workloads.record(workloads.WORKLOADS["distribution, backward"])[1:]:
        of = launch.options
        tile = 3 * of["BLOCK_I"] * of["BLOCK_J"] * of["BLOCK_D"]
        assert roofline.examine(launch, "sm_90").loops[0].multiply_adds * of["num_warps"] == tile
    assert found["us"] >= max(found["matrix us"], found["issue us"])
    assert found["measured us"] == pytest.approx(427.9, abs=0.1)


@needs_triton
def test_options_for_each_vendor() -> None:
    from mmvq_kernels.gpu.launching import fit

    exact, fast = {"PRECISION": "tf32x3", "num_stages": 3}, {"PRECISION": "tf32", "num_stages": 1}
    search = {"PRECISION": "fp16", "num_stages": 3, "BLOCK_L": 128}
    assert fit(exact, amd=None) == exact
    assert fit(fast, amd=None) == fast
    for arch in ("gfx942", "gfx90a"):
        assert fit(exact, amd=arch) == {"PRECISION": "ieee", "num_stages": 2}
        assert fit(search, amd=arch) == {"PRECISION": "fp16", "num_stages": 2, "BLOCK_L": 64}
    assert fit(fast, amd="gfx942") == fast
    assert fit(fast, amd="gfx90a") == {"PRECISION": "ieee", "num_stages": 1}


AMPERE = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   HMMA.1688.F32.TF32 R80, R136.reuse, R148, RZ ;
        /*0050*/                   HMMA.16816.F32.BF16 R80, R136, R148, R80 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   LDGDEPBAR ;
.L_x_2:
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
"""
HOPPER = """
.L_x_5:
        /*0100*/                   LDSM.16.M88.4 R48, [R70+UR33] ;
        /*0110*/                   HGMMA.64x128x8.F32.TF32 R28, R48, gdesc[UR52], RZ, !UPT ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R28, gdesc[UR4], R28, gsb0 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/                   BRA.U UP0, `(.L_x_5) ;
"""


def test_what_a_loop_costs() -> None:
    """A loop in a loop, with a branch past one instruction; products of a warp, and of four."""
    inner, outer = loops(AMPERE)
    assert inner == Loop(instructions=7, multiply_adds=16 * 8 * (8 + 16), waits=2, skipped=1)
    assert outer == Loop(instructions=3, multiply_adds=0, waits=1)
    (loop,) = loops(HOPPER)
    assert loop == Loop(5, 64 * (128 * 8 + 64 * 16) // 4, 1)
    assert loop.per_thousand == 5000 / 32768
    assert loops("") == []


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
        tensor=0,
        warps=4,
        warps_resident=16,
        matrix=True,
        wide=True,
        narrow=False,
        trap=False,
        atomics=("atom.global.gpu.relaxed.min.s64",),
    )
    assert violations(good) == []
    assert violations(replace(good, spills=8)) == ["spills 8"]
    assert violations(replace(good, shared=1 << 18)) == ["262144 bytes of shared memory"]
    assert violations(replace(good, shared=100 << 10)) == []
    assert violations(replace(good, shared=100 << 10, target="sm_80")) == [
        "102400 bytes of shared memory"
    ]
    assert violations(replace(good, tensor=64)) == ["64 columns of tensor memory"]
    assert violations(replace(good, tensor=512, target="sm_100")) == []
    assert violations(replace(good, narrow=True)) == ["a 32-bit product in an address"]
    assert violations(replace(good, warps_resident=4)) == ["4 warps on a multiprocessor"]
    assert violations(replace(good, matrix=False)) == ["no tf32x3 matrix instruction"]
    assert violations(replace(good, wide=False)) == ["no 16-byte access"]
    assert violations(replace(good, wide=False, aligned=False)) == []
    assert violations(replace(good, trap=True)) == ["a trap"]
    add = ("atom.global.gpu.relaxed.add.f32",)
    assert violations(replace(good, atomics=add)) == [f"atomics {list(add)}"]
    assert violations(replace(good, atomics_allowed=False)) == [f"atomics {list(good.atomics)}"]

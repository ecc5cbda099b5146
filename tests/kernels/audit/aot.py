"""Compile every kernel for GPUs that are not here, and read what came out.

    PYTHONPATH=.:tests python -m kernels.audit.aot [--table | --report] [--only NAME] [--jobs 2]

A kernel that compiles may still spill its registers, ask for more shared memory than there is, or
consist of a lone trap. `audit` compiles the launches of `kernels.audit.workloads` for the GPUs of
`TARGETS`, so that what is compiled is what would be launched;
`violations` lists what is wrong with the outcome. Needs triton, no GPU, and a process in which
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernels.audit.loops import Loop, loops
from kernels.audit.workloads import WORKLOADS, Launch, record
from torch import Tensor


class Target(NamedTuple):
    """A GPU: what triton calls it, and what one multiprocessor of it holds."""

    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes of shared memory
    block: int  # bytes of it that one block may have
    tensor: int  # columns of tensor memory
    registers: int  # of 32 bits
    warps: int  # resident at most

    @property
    def capability(self) -> int:
        """As of NVIDIA's; 0 of AMD's."""
        return self.arch if isinstance(self.arch, int) else 0

    @property
    def amd(self) -> str | None:
        """The architecture, if AMD's."""
        return str(self.arch) if self.backend == "hip" else None


TARGETS = {  # on an A100 a block may have 163 KB; sm_86 and sm_89 run the same code with 99
    "sm_80": Target("cuda", 80, 32, 163 << 10, 99 << 10, 0, 65536, 64),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 227 << 10, 0, 65536, 64),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 227 << 10, 512, 65536, 64),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 0, 4 * 512 * 64, 32),
}
_MATRIX = {  # target, precision -> the instruction that must do the products
    "sm_80": {"tf32x3": r"mma\.sync\S*tf32", "tf32": r"mma\.sync\S*tf32", "fp16": r"mma\S*f16"},
    "sm_90": {"tf32x3": r"wgmma\S*tf32", "tf32": r"wgmma\S*tf32", "fp16": r"wgmma\S*f16"},
    "sm_100": {
        "tf32x3": r"tcgen05\.mma\S*tf32",
        "tf32": r"tcgen05\.mma\S*tf32",
        "fp16": r"tcgen05\.mma\S*f16",
    },
    "gfx942": {
        "ieee": r"v_mfma_f32_\w+x\d_?f32",
        "tf32": r"v_mfma\w*xf32",
        "fp16": r"v_mfma\w*_f16",
    },
}
_WIDE = {  # 16 bytes for each thread at once, from or to global memory
    "cuda": r"(ld|st)\.global\S*\.v(4\.[bfu]32|2\.[bu]64|8\.)|cp\.async\.cg\.\S+ .* 0x10",
    "hip": r"(global|buffer)_(load|store)_dwordx4",
}
_ATOMIC = {"cuda": r"\b(?:red|atom)\.\S+", "hip": r"\b(?:global|buffer|flat)_atomic_\w+"}
_NARROW = r"arith\.muli .*tensor<\S*xi32>"  # where a row times its width may pass 2^31
_ORDERLESS = r"(min\.s64|smin_x2|add\.[su]32|_add(_u32)?$)"  # of integers: no order shows
_COUNTED = "sm_80", "sm_90"  # whose matrix instructions `loops` knows
_PROCESSORS = 132  # of an H100, for which launches are planned where there is no GPU to ask
_SIZES = "N", "L", "D", "T", "P", "NI", "NJ"  # of tensors
_WITH_ATOMICS = "search_kernel", "filter_kernel", "commit_kernel", "scatter_atomic_kernel"


@dataclass(frozen=True)
class Outcome:
    """What a kernel became on a target."""

    kernel: str
    target: str
    precision: str  # of its matrix products, "" without any
    atomics_allowed: bool
    aligned: bool  # all sizes divide by 16, so that wide access must appear
    registers: int
    spills: int  # bytes of stack, or spilled registers
    shared: int
    tensor: int  # columns of tensor memory
    warps: int
    warps_resident: int  # for each multiprocessor
    matrix: bool
    wide: bool
    narrow: bool  # a tile's address is multiplied in 32 bits
    trap: bool
    atomics: tuple[str, ...]
    loops: tuple[Loop, ...] = ()  # that multiply, the innermost first; of `_COUNTED` alone
    busy: float | None = None  # share of an H100's places for blocks that is taken, of all waves


def compile_launch(launch: Launch, target: Target) -> Any:
    """What the runtime would compile for these arguments: triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmvq_kernels.gpu.launching import fit

    kernel, _, args, _ = launch
    options = fit(launch.options, amd=target.amd)
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    names |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        value = args[i] if i < len(args) else options.pop(name)
        if i >= len(args) or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = names[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    where = GPUTarget(target.backend, target.arch, target.warp)
    return triton.compile(source, target=where, options=options)


def examine(launch: Launch, target_name: str) -> Outcome:
    """Compile a launch for a target and read the machine code."""
    from mmvq_kernels.gpu.launching import fit

    target, kernel = TARGETS[target_name], launch.kernel
    options = fit(launch.options, amd=target.amd)
    precision = options.get("PRECISION", "")
    small = target.backend == "cuda" and options.get("BLOCK_T", 64) < 64  # for a group of warps
    instruction = _MATRIX["sm_80" if small else target_name].get(precision, "")
    arguments = zip(kernel.arg_names, launch.args, strict=False)
    vectors = "D" in kernel.arg_names and kernel.__name__ != "survey_kernel"  # or lists of codes
    sizes = {name: x for name, x in arguments if type(x) is int and name in _SIZES}
    compiled = compile_launch(launch, target)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    counted = bool(precision) and target_name in _COUNTED
    registers, spills, code = _registers(compiled, target, counted)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    tensor = getattr(compiled.metadata, "tmem_size", None) or 0
    resident = _resident(target, warps, registers, shared, tensor)
    waves = math.prod(launch.grid) / max(_PROCESSORS * resident, 1)
    return Outcome(
        kernel=kernel.__name__,
        target=target_name,
        precision=precision,
        atomics_allowed=kernel.__name__ in _WITH_ATOMICS,
        aligned=vectors and all(x % 16 == 0 for x in sizes.values()),
        registers=registers,
        spills=spills,
        shared=shared,
        tensor=tensor,
        warps=warps,
        warps_resident=warps * resident,
        matrix=bool(precision and re.search(instruction, text)),
        wide=re.search(_WIDE[target.backend], text) is not None,
        narrow=re.search(_NARROW, compiled.asm["ttir"]) is not None,
        trap=re.search(r"^\s*(s_)?trap\b", text, re.MULTILINE) is not None,
        atomics=tuple(sorted(set(re.findall(_ATOMIC[target.backend], text)))),
        loops=tuple(loops(code)) if counted else (),
        busy=waves / math.ceil(waves) if target_name == "sm_90" else None,
    )


def _registers(compiled: Any, target: Target, with_code: bool) -> tuple[int, int, str]:
    """Those that a thread has, what says that they were too few (0: they were not), the code.

    The code is "" where nobody asks for it and without a stack, which is where spills go.
    """
    if target.backend == "cuda":
        usage = _read("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
        registers, stack = (int(*re.findall(rf"{x}:(\d+)", usage)) for x in ("REG", "STACK"))
        code = _read("nvdisasm", "-c", compiled.asm["cubin"]) if with_code or stack else ""
        return registers, stack + len(re.findall(r"\b(LDL|STL)\b", code)), code
    text = compiled.asm["amdgcn"]
    (registers,) = set(re.findall(r"\.vgpr_count:\s+(\d+)", text))
    lost = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    return int(registers), sum(map(int, lost)), text


def _resident(target: Target, warps: int, registers: int, shared: int, tensor: int) -> int:
    """How many blocks a multiprocessor holds at a time."""
    registers = -(-registers // 8) * 8  # they are handed out in eights
    if target.backend == "cuda":
        by_registers = target.registers // (registers * target.warp * warps)
    else:  # four units, each of 512 registers for a lane, and of eight warps at most
        by_registers = 4 * min(8, 512 // registers) // warps
    limits = [by_registers, target.warps // warps, 32]
    limits += [target.shared // shared] if shared else []
    limits += [target.tensor // tensor] if tensor else []
    return min(limits)


@functools.cache  # several workloads have some machine code in common
def _read(tool: str, flag: str, cubin: bytes) -> str:
    """What a tool of NVIDIA says of machine code."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__path__[0]) / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True)
    return said.stdout


def violations(outcome: Outcome) -> list[str]:
    """What is wrong with a compiled kernel; empty when nothing is."""
    o, target = outcome, TARGETS[outcome.target]
    floats = "atomic" in o.kernel  # the one kernel that may add them up in any order
    orderly = [a for a in o.atomics if o.atomics_allowed and (floats or re.search(_ORDERLESS, a))]
    stray = sorted(set(o.atomics) - set(orderly))
    wrong = {
        f"spills {o.spills}": o.spills > 0,
        f"{o.shared} bytes of shared memory": o.shared > target.block,
        f"{o.tensor} columns of tensor memory": o.tensor > target.tensor,
        f"{o.warps_resident} warps on a multiprocessor": o.warps_resident < 8,
        f"no {o.precision} matrix instruction": o.precision and not o.matrix,
        "no 16-byte access": o.aligned and not o.wide,
        "a 32-bit product in an address": o.narrow,
        "a trap": o.trap,
        f"atomics {stray}": stray,
    }
    return [text for text, is_wrong in wrong.items() if is_wrong]


def audit(jobs: int = 2, only: str = "") -> dict[str, Outcome]:
    """Every distinct kernel of every workload on every target, by `workload/kernel/target`."""
    tasks = [(name, target) for target in TARGETS for name in WORKLOADS if name.startswith(only)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_audit_workload, *zip(*tasks, strict=True)))
    return {key: outcome for part in parts for key, outcome in part.items()}


def _audit_workload(name: str, target: str) -> dict[str, Outcome]:
    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    for launch in record(WORKLOADS[name], TARGETS[target].capability):
        kernel = launch.kernel.__name__ + ", codes" * launch.options.get("OF_CODES", False)
        key = f"{name}/{kernel}/{target}"
        assert key not in outcomes  # or one of the two would not be seen
        outcomes[key] = examine(launch, target)
    return outcomes


def table(outcomes: dict[str, Outcome]) -> dict[str, dict[str, list[float]]]:
    """Triton's version -> workload/kernel/target -> registers, bytes shared, resident warps.

    On the GPUs whose loops are counted a kernel that multiplies has a fourth number: instructions
    for 1,000 multiply-adds in its innermost loop.
    """
    import triton

    numbers: dict[str, list[float]] = {}
    for key, o in outcomes.items():
        numbers[key] = [o.registers, o.shared, o.warps_resident]
        numbers[key] += [round(loop.per_thousand, 1) for loop in o.loops[:1]]
    return {triton.__version__: numbers}


def markdown(numbers: dict[str, list[float]]) -> str:
    """One version of `table` as the documents show it: registers, KB shared, resident warps."""
    rows: dict[str, dict[str, str]] = {}
    for key, (registers, shared, warps, *_) in numbers.items():
        workload, kernel, target = key.split("/")
        cells = rows.setdefault(f"`{kernel}` | {workload}", {})
        cells[target] = f"{registers}, {shared / 1024:.1f}, {warps}"
    lines = [f"| kernel | workload | {' | '.join(TARGETS)} |", "|---|---" + "|---" * 4 + "|"]
    lines += [f"| {row} | {' | '.join(cells[t] for t in TARGETS)} |" for row, cells in rows.items()]
    return "\n".join(lines)


def speeds(outcomes: dict[str, Outcome]) -> str:
    """What the innermost loops that multiply cost, and how full an H100 is, in Markdown.

    A cell: instructions for 1,000 multiply-adds, and waits in a pass through the loop.
    """
    rows: dict[str, list[str]] = {}
    for key, o in outcomes.items():
        workload, kernel, _ = key.split("/")
        for loop in o.loops[:1]:
            cells = rows.setdefault(f"`{kernel}` | {workload}", [])
            cells.append(f"{loop.per_thousand:.1f}, {loop.waits}")
            cells += [f"{o.busy:.0%}"] if o.busy else []
    lines = [f"| kernel | workload | {' | '.join(_COUNTED)} | busy |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {row} | {' | '.join(cells)} |" for row, cells in rows.items()])


def main(argv: list[str] | None = None) -> int:
    """Print the audit; the exit status is 1 when a kernel violates a rule."""
    parser = argparse.ArgumentParser(prog="python -m kernels.audit.aot", description=__doc__)
    parser.add_argument("--table", action="store_true", help="the outcome as JSON")
    parser.add_argument("--report", action="store_true", help="as Markdown, and a static roofline")
    parser.add_argument("--only", default="", help="workloads whose names start so")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(argv)
    outcomes = audit(options.jobs, options.only)
    if options.report:
        from kernels.audit.roofline import report

        ((_, numbers),) = table(outcomes).items()
        print(markdown(numbers), speeds(outcomes), report(), sep="\n\n")
    elif options.table:
        print(json.dumps(table(outcomes), indent=1))
    else:
        for key, o in outcomes.items():
            print(f"{key}: {o.registers} registers, {o.shared} B shared, {o.warps_resident} warps")
    broken = {key: v for key, outcome in outcomes.items() if (v := violations(outcome))}
    for key, wrong in broken.items():
        print(f"{key}: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())

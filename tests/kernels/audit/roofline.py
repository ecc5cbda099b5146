"""What no operation can be faster than, from the launches it would make: a static roofline.

Nothing here is measured. Each launch has matrix work, instructions, bytes that any such launch must
move through memory (every tensor once, one that is updated twice), and bytes that its tiles move
between the L2 cache and the processors; it takes the longest of the four at the peak of an H100
(data sheet; the L2 figure is the one commonly measured). Instructions are those of the loops that
multiply, counted in the code compiled for it; others are left out. Calls of torch are counted as
reading and writing their tensors once, products in float32 as it is. The unfused way is made of
such calls alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernels.audit import workloads
from kernels.audit.aot import Outcome, examine
from kernels.audit.workloads import Launch, record
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FP16, TF32, FP32 = 989e12, 495e12, 67e12  # operations for each second
HBM, L2 = 3.35e12, 5.5e12  # bytes for each second
ISSUE = 132 * 4 * 1.755e9  # instructions of warps: four schedulers to a processor, one each a cycle
ROWS = (1600, 65536)
SIZES = {
    "search": [(N, L, D) for N in ROWS for L in (400, 1024, 8192, 65536) for D in (8, 64, 256)],
    "statistics": [(N, L, D) for N in ROWS for L in (400, 8192, 65536) for D in (64, 256)],
    "average": [(0, L, D) for L in (400, 8192, 65536, 262144) for D in (64, 256)],
    "distribution": [(800, L, D) for L in (400, 8192, 65536) for D in (64, 256)],  # clips of 10
}


MEASURED = Path(__file__).parents[3] / "docs/benchmarks/gpu/search-and-step.json"


class Cost(NamedTuple):
    """Of a launch: operations and instructions, bytes through L2 and through memory."""

    work: float
    issued: float
    l2: float
    memory: float
    rate: float = TF32  # operations for each second

    @property
    def seconds(self) -> dict[str, float]:
        """By what would bind if it bound alone."""
        matrix, issue = self.work / self.rate, self.issued / ISSUE
        return {"matrix": matrix, "issue": issue, "L2": self.l2 / L2, "HBM": self.memory / HBM}


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do: calls that are no views, bytes, seconds at the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number: int = 0
        self.bytes: int = 0
        self.seconds: float = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
        view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        if view or "empty" in name or func.namespace != "aten":
            return out
        makes = name.startswith(("new_", "zeros", "ones", "full")) or name.endswith("_like")
        moved = sum(
            x.nbytes for x in tree_leaves(out if makes else (args, out)) if isinstance(x, Tensor)
        )
        left = {"mm": 0, "addmm": 1}.get(name)  # which argument is the left factor of a product
        work = 0 if left is None else 2 * args[left].shape[1] * out.numel()
        self.number += 1
        self.bytes += moved
        self.seconds += max(moved / HBM, work / FP32)
        return out


def cost(launch: Launch) -> Cost:
    """What a launch cannot do without."""
    of = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    name, tensors = launch.kernel.__name__, [x for x in launch.args if isinstance(x, Tensor)]
    memory = sum(x.nbytes for x in tensors)
    if name == "survey_kernel":  # with the dead given, it does not look at the codes themselves
        memory -= of["codes"].nbytes
        read_by_all = 2 * of["batch_counts"].nbytes + of["counts"].nbytes + of["dead"].nbytes
        return Cost(0, 0, memory + launch.grid[0] * read_by_all, memory)
    if name == "gather_kernel":
        read_by_all = sum(of[x].nbytes for x in ("indices", "groups") if of[x] is not None)
        return Cost(0, 0, memory + launch.grid[0] * launch.grid[1] * read_by_all, memory)
    if name == "average_kernel":
        memory += of["sums"].nbytes
    if "PRECISION" not in of:
        return Cost(0, 0, memory, memory)
    search, gradient = name == "search_kernel", name == "gradient_kernel"
    NI, NJ = (of["NI"], of["NJ"]) if gradient else (of["N"], of["L"])
    D = of["P"] if search else -(-of["D"] // of["BLOCK_D"]) * of["BLOCK_D"]
    rows, others = (of["BLOCK_N"], of["BLOCK_L"]) if search else (of["BLOCK_I"], of["BLOCK_J"])
    i, j = -(-NI // rows), -(-NJ // others)
    products = 1 if search and of["low"] is None else 3
    work = products * 2 * i * rows * j * others * D
    if gradient:  # p / d and g w / d for each block of columns, the other side, its parts
        l2 = 8 * launch.grid[1] * NI * NJ + 4 * D * i * NJ + of["out"].nbytes
    elif search:  # the float16 parts of codes and vectors, which may be read once by a program
        read = i * launch.grid[1] if of["ONCE"] else i * j
        l2 = 2 * min(products, 2) * D * (i * j * others + read * rows)
    else:  # ln P, its gradient, p / d and g w / d for each pair, or the distance
        l2 = 4 * D * (i * NJ + j * NI) + (16 if name == "pull_kernel" else 4) * NI * NJ
    compiled = _compiled(launch)
    inner, *outer = compiled.loops
    issued = work / 2 / inner.multiply_adds * (inner.instructions - inner.skipped)
    of_tile = inner.skipped + sum(loop.instructions for loop in outer)
    issued += i * j * compiled.warps * of_tile
    return Cost(work, issued, l2, memory, FP16 if search else TF32)


_OUTCOMES: dict[object, Outcome] = {}


def _compiled(launch: Launch) -> Outcome:
    """For an H100; launches that differ in sizes alone are compiled once."""
    special = [
        x.dtype if isinstance(x, Tensor) else x and (x == 1, x % 16 == 0) for x in launch.args
    ]
    key = launch.kernel.__name__, str(special), str(launch.options)
    if key not in _OUTCOMES:
        _OUTCOMES[key] = examine(launch, "sm_90")
    return _OUTCOMES[key]


def _unfused_search(N: int, L: int, D: int) -> None:
    x, e = torch.empty(N, D), torch.empty(L, D)
    torch.addmm(e.square().sum(1), x, e.T, alpha=-2).argmin(1)


def _unfused_statistics(N: int, L: int, D: int) -> None:
    x, index = torch.empty(N, D), torch.empty(N, dtype=torch.long)
    chosen = (index[:, None] == torch.arange(L)).float()  # one-hot [N, L]
    torch.mm(chosen.T, x), chosen.sum(0)


def _unfused_average(N: int, L: int, D: int) -> None:
    o, s, replacement = (torch.empty(L, D) for _ in range(3))
    n, c, dead = torch.empty(L), torch.empty(L), torch.empty(L, dtype=torch.bool)
    n.mul_(0.99).add_(c, alpha=0.01)
    o.mul_(0.99).add_(s, alpha=0.01)
    total = n.sum()
    smoothed = (n + 1e-5).mul_(total / (total + 1e-5 * L))[:, None]
    o.copy_(torch.where(dead[:, None], replacement * smoothed, o))
    torch.div(o, smoothed)


def _unfused_distribution(N: int, L: int, D: int) -> None:
    x, e = torch.empty(N, D, requires_grad=True), torch.empty(L, D, requires_grad=True)
    norms = x.square().sum(1, keepdim=True) + e.square().sum(1)
    distance = torch.addmm(norms, x, e.T, alpha=-2).clamp(min=1e-7).sqrt()
    log_p = distance.neg().log_softmax(1).unflatten(0, (-1, 10)).logsumexp(1)
    log_p.backward(torch.empty_like(log_p))


Size = Callable[[int, int, int], object]
OURS: dict[str, Size] = {
    "search": workloads.search,
    "statistics": workloads.statistics,
    "average": lambda N, L, D: workloads.average(L, D),
    "distribution": lambda N, L, D: workloads.distribution(N // 10, 10, L, D),
}
UNFUSED: dict[str, Size] = {
    "search": _unfused_search,
    "statistics": _unfused_statistics,
    "average": _unfused_average,
    "distribution": _unfused_distribution,
}
LEAST: dict[str, Callable[[int, int, int], int]] = {  # inputs and results, each moved once
    "search": lambda N, L, D: 4 * (N + L) * D + 8 * N,
    "statistics": lambda N, L, D: 4 * (N + L) * D + 16 * N + 8 * L,
    "average": lambda N, L, D: 4 * (4 * L * D + 3 * L),
    "distribution": lambda N, L, D: 4 * (4 * (N + L) * D + 3 * N // 10 * L),
}


def row(operation: str, N: int, L: int, D: int) -> dict[str, Any]:
    """One line of the report."""
    calls, unfused = Calls(), Calls()

    def work() -> None:
        with calls:
            OURS[operation](N, L, D)

    launches = record(work)
    with FakeTensorMode(), unfused:
        UNFUSED[operation](N, L, D)
    costs = [cost(launch) for launch in launches]
    seconds = {name: sum(c.seconds[name] for c in costs) for name in costs[0].seconds}
    seconds["HBM"] += calls.seconds
    return {
        "operation": operation,
        "N": N or "-",
        "L": L,
        "D": D,
        "launches": len(launches),
        "of torch": calls.number,
        "programs": max(torch.Size(launch.grid).numel() for launch in launches),
        "least MB": LEAST[operation](N, L, D) / 1e6,
        "MB": (sum(c.memory for c in costs) + calls.bytes) / 1e6,
        "L2 MB": round(sum(c.l2 for c in costs) / 1e6),
        "Gflop": sum(c.work for c in costs) / 1e9,
        "matrix us": 1e6 * seconds["matrix"],
        "issue us": 1e6 * seconds["issue"],
        "bound by": max(seconds, key=lambda name: seconds[name]),
        "us": 1e6 * (sum(max(c.seconds.values()) for c in costs) + calls.seconds),
        "measured us": measured().get((operation, N, L, D), "-"),
        "unfused calls": unfused.number,
        "unfused MB": round(unfused.bytes / 1e6),
        "unfused us": 1e6 * unfused.seconds,
    }


@functools.cache
def measured() -> dict[tuple[str, int, int, int], float]:
    """Microseconds of an earlier form of the search on an H100, in float32."""
    (run,) = json.loads(MEASURED.read_text())["runs"]
    rows = [r for r in run["rows"] if r.get("dtype") == "float32" and "L" in r]
    return {("search", r["N"], r["L"], r["D"]): 1e3 * r["ms"]["mmvq"]["gpu"] for r in rows}


def report() -> str:
    """All sizes, in Markdown."""
    rows = [row(operation, *size) for operation, sizes in SIZES.items() for size in sizes]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(map(_cell, line.values())) for line in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"

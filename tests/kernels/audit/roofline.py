"""What no operation can be faster than, from the launches it would make: a static roofline.

Nothing here is measured. Each launch has matrix work, bytes that any such launch must move through
memory (every tensor once, one that is updated twice), and bytes that its tiles move between the L2
cache and the processors; it takes the longest of the three at the peak of an H100 (data sheet; the
L2 figure is the one commonly measured). Calls of torch are counted as reading and writing their
tensors once, products in float32 as it is. The unfused way is made of such calls alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernels.audit import workloads
from kernels.audit.workloads import Launch, record
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FP16, TF32, FP32 = 989e12, 495e12, 67e12  # operations for each second
HBM, L2 = 3.35e12, 5.5e12  # bytes for each second
ROWS = (1600, 65536)
SIZES = {
    "search": [(N, L, D) for N in ROWS for L in (400, 1024, 8192, 65536) for D in (8, 64, 256)],
    "statistics": [(N, L, D) for N in ROWS for L in (400, 8192, 65536) for D in (64, 256)],
    "average": [(0, L, D) for L in (400, 8192, 65536, 262144) for D in (64, 256)],
    "distribution": [(800, L, D) for L in (400, 8192, 65536) for D in (64, 256)],  # clips of 10
}


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


def cost(launch: Launch) -> tuple[float, float, float]:
    """Matrix operations, bytes through L2, bytes through memory."""
    of = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    name, tensors = launch.kernel.__name__, [x for x in launch.args if isinstance(x, Tensor)]
    memory = sum(x.nbytes for x in tensors)
    if name == "survey_kernel":  # with the dead given, it does not look at the codes themselves
        memory -= of["codes"].nbytes
        read_by_all = 2 * of["batch_counts"].nbytes + of["counts"].nbytes + of["dead"].nbytes
        return 0, memory + launch.grid[0] * read_by_all, memory
    if name == "gather_kernel":
        read_by_all = sum(of[x].nbytes for x in ("indices", "groups") if of[x] is not None)
        return 0, memory + launch.grid[0] * launch.grid[1] * read_by_all, memory
    if name == "average_kernel":
        memory += of["sums"].nbytes
    if name == "search_kernel":
        work, l2 = _search(of, launch.grid)
        return work, l2, memory
    if "PRECISION" not in of:
        return 0, memory, memory
    N, L, D = (of[size] for size in "NLD")
    pairs = 8 * N * L if "grad" in of else 0  # ln P and its gradient, for each pair
    if name == "clip_kernel":
        work, l2 = (launch.grid[0] * x for x in _tiles(L, of["T"], D, of["BLOCK_I"], of["BLOCK_J"]))
    elif name == "gradient_kernel":
        work, l2 = _tiles(of["NI"], of["NJ"], D, of["BLOCK_I"], of["BLOCK_J"])
        columns = launch.grid[1]  # the distances are made anew for each block of columns
        work, l2, pairs = work * (columns + 1), l2 * columns + l2 / 2, pairs * columns
    else:
        work, l2 = _tiles(N, L, D, of["BLOCK_I"], of["BLOCK_J"])
    return work, l2 + pairs, memory


def _search(of: dict[str, Any], grid: tuple[int, ...]) -> tuple[float, float]:
    """Products of float16 parts, and the parts of tiles from L2."""
    tiles = grid[0] * -(-of["L"] // of["BLOCK_L"])
    parts, products = (1, 1) if of["low"] is None else (2, 3)
    vectors = grid[0] * grid[1] if of["ONCE"] else tiles  # how often a block of them is read
    l2 = 2 * parts * of["P"] * (tiles * of["BLOCK_L"] + vectors * of["BLOCK_N"])
    return 2 * products * tiles * of["BLOCK_N"] * of["BLOCK_L"] * of["P"], l2


def _tiles(NI: int, NJ: int, D: int, block_i: int, block_j: int) -> tuple[float, float]:
    """All products of NI rows with NJ others in tf32x3: three products; their tiles from L2."""
    i, j = -(-NI // block_i), -(-NJ // block_j)
    return 3 * 2 * i * block_i * j * block_j * D, 4 * D * (i * NJ + j * NI)


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
    peaks = [FP16 if x.options.get("PRECISION") == "fp16" else TF32 for x in launches]
    each = [
        {"matrix": w / peak, "L2": l2 / L2, "HBM": m / HBM}
        for peak, (w, l2, m) in zip(peaks, costs, strict=True)
    ]
    seconds = {name: sum(c[name] for c in each) for name in ("matrix", "L2", "HBM")}
    seconds["HBM"] += calls.seconds
    return {
        "operation": operation,
        "N": N or "-",
        "L": L,
        "D": D,
        "launches": len(launches),
        "of torch": calls.number,
        "programs": max(
            torch.Size(launch.grid).numel()
            for launch in launches
            if launch.kernel.__name__ != "prepare_kernel"
        ),
        "least MB": LEAST[operation](N, L, D) / 1e6,
        "MB": (sum(m for _, _, m in costs) + calls.bytes) / 1e6,
        "L2 MB": round(sum(l2 for _, l2, _ in costs) / 1e6),
        "Gflop": sum(w for w, _, _ in costs) / 1e9,
        "bound by": max(seconds, key=lambda name: seconds[name]),
        "us": 1e6 * (sum(max(c.values()) for c in each) + calls.seconds),
        "unfused calls": unfused.number,
        "unfused MB": round(unfused.bytes / 1e6),
        "unfused us": 1e6 * unfused.seconds,
    }


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

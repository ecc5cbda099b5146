"""What the search cannot be faster than, from the launches it would make: a static roofline.

Nothing here is measured. For each size: the bytes that any search must move, those that ours moves
between the L2 cache and the processors, its matrix work, and the time each would take alone at the
peak of an H100 (data sheet; the L2 figure is the one commonly measured). The largest of them is the
bound. The unfused way writes and reads the `[N, L]` scores besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

TF32, HBM, L2 = 495e12, 3.35e12, 5.5e12  # products and sums, bytes, bytes: for each second
SIZES = [(N, L, D) for N in (1600, 65536) for L in (400, 1024, 8192, 65536) for D in (8, 64, 256)]


def search_row(N: int, L: int, D: int) -> dict[str, float]:
    """Bytes, operations and seconds of one exact float32 search."""
    from mmvq_kernels.aot import record
    from mmvq_kernels.gpu.nearest import search

    def fake(rows: int) -> Tensor:
        return torch.empty(rows, D, device="cuda")

    _, launch = record(lambda: search(fake(N), fake(L)))
    blocks, splits = launch.grid
    width = D + -D % 16
    block_l = launch.options["BLOCK_L"]
    tiles = -(-L // block_l)
    least = 4 * (N * D + L * D) + 8 * N
    l2 = 4 * width * (blocks * L + tiles * N)  # every block reads all codes; its rows once a tile
    work = 3 * 2 * N * L * width  # tf32x3: three products
    seconds = {"matrix": work / TF32, "L2": l2 / L2, "HBM": least / HBM}
    unfused = max(work / TF32, (least + 8 * N * L) / HBM)
    return {
        "least_bytes": least,
        "l2_bytes": l2,
        "work": work,
        "programs": blocks * splits,
        "bound": max(seconds.values()),
        "unfused_bytes": least + 8 * N * L,
        "unfused_bound": unfused,
        **seconds,
    }


def report() -> str:
    """The table of all sizes, in Markdown."""
    lines = [
        "| N | L | D | programs | least MB | L2 MB | Gflop | bound by | us | unfused MB | us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for N, L, D in SIZES:
        row = search_row(N, L, D)
        by = max(("matrix", "L2", "HBM"), key=lambda name: row[name])
        lines.append(
            f"| {N:,} | {L:,} | {D} | {row['programs']:,} | {row['least_bytes'] / 1e6:.1f} "
            f"| {row['l2_bytes'] / 1e6:,.0f} | {row['work'] / 1e9:,.1f} | {by} "
            f"| {row['bound'] * 1e6:,.0f} | {row['unfused_bytes'] / 1e6:,.0f} "
            f"| {row['unfused_bound'] * 1e6:,.0f} |"
        )
    return "\n".join(lines)

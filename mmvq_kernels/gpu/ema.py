"""One step of the moving average (Eq. 7), reset included, in two launches.

`counts_kernel` is one program that reads the `[L]` vectors: it moves N and leaves the smoothed N
that every code is divided by. `codes_kernel` moves o and e, `[L, D]`, in one pass over memory.
Sums over codes run in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv


@triton.jit
def counts_kernel(
    counts,  # fp32 [L], written
    batch_counts,  # [L]
    dead,  # uint8 [L], or None
    smoothed,  # fp32 [L], out; all -1 for a batch without a vector: nothing is to move
    L,
    decay,
    gain,  # 1 - decay
    eps,
    RESET: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program for all codes."""
    places = tl.arange(0, BLOCK_L)
    batch = tl.zeros([BLOCK_L], tl.float32)
    for start in tl.range(0, L, BLOCK_L):
        at = start + places
        batch += tl.load(batch_counts + at, mask=at < L, other=0).to(tl.float32)
    some = tl.sum(batch) > 0
    decay = tl.where(some, decay, 1.0).to(tl.float32)
    gain = tl.where(some, gain, 0.0).to(tl.float32)

    moved = tl.zeros([BLOCK_L], tl.float32)
    moved_dead = tl.zeros([BLOCK_L], tl.float32)
    number_dead = tl.zeros([BLOCK_L], tl.float32)
    for start in tl.range(0, L, BLOCK_L):
        at = start + places
        n = tl.load(batch_counts + at, mask=at < L, other=0).to(tl.float32)
        moved_here = decay * tl.load(counts + at, mask=at < L, other=0.0) + gain * n
        moved += moved_here
        if RESET:
            is_dead = tl.load(dead + at, mask=at < L, other=0) != 0
            moved_dead += tl.where(is_dead, moved_here, 0.0)
            number_dead += tl.where(is_dead, 1.0, 0.0)
    total = tl.sum(moved)
    mass = tl.sum(moved_dead) / tl.maximum(tl.sum(number_dead), 1.0)
    scale = total / (total + L * eps)

    for start in tl.range(0, L, BLOCK_L):
        at = start + places
        n = tl.load(batch_counts + at, mask=at < L, other=0).to(tl.float32)
        new = decay * tl.load(counts + at, mask=at < L, other=0.0) + gain * n
        if RESET:
            is_dead = tl.load(dead + at, mask=at < L, other=0) != 0
            new = tl.where(is_dead, tl.where(some, mass, new), new)
        tl.store(counts + at, new, mask=at < L)
        tl.store(smoothed + at, tl.where(some, (new + eps) * scale, -1.0), mask=at < L)


@triton.jit
def codes_kernel(
    codes,  # fp32 [L, D], written
    sums,  # fp32 [L, D], written
    batch_sums,  # [L, D]
    dead,  # uint8 [L], or None
    replacement,  # [L, D], or None
    smoothed,  # fp32 [L]
    L,
    D,
    decay,
    gain,  # 1 - decay
    RESET: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_L codes by BLOCK_D columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mass = tl.load(smoothed + rows, mask=rows < L, other=-1.0)[:, None]
    inside = (mass >= 0) & (columns < D)[None, :]
    cells = rows[:, None] * D + columns[None, :]
    s = tl.load(batch_sums + cells, mask=inside, other=0).to(tl.float32)
    new = decay * tl.load(sums + cells, mask=inside, other=0.0) + gain * s
    if RESET:
        is_dead = (tl.load(dead + rows, mask=rows < L, other=0) != 0)[:, None]
        revived = tl.load(replacement + cells, mask=inside & is_dead, other=0).to(tl.float32)
        new = tl.where(is_dead, revived * mass, new)
    tl.store(sums + cells, new, mask=inside)
    e = tl.div_rn(new, tl.broadcast_to(mass, new.shape))
    tl.store(codes + cells, e, mask=inside & (mass > 0))  # without mass, a code stays


def update_(
    codes: Tensor,
    sums: Tensor,
    counts: Tensor,
    batch_sums: Tensor,
    batch_counts: Tensor,
    decay: float,
    eps: float,
    dead: Tensor | None,
    replacement: Tensor | None,
) -> None:
    """`mmvq_kernels.ema_update_` on a GPU, for float32 state."""
    written = codes, sums, counts
    codes, sums, counts = (x.contiguous() for x in written)
    batch_sums, batch_counts = batch_sums.contiguous(), batch_counts.contiguous()
    reset = dead is not None and replacement is not None
    dead = dead.contiguous().view(torch.uint8) if dead is not None else None
    replacement = replacement.contiguous() if replacement is not None else None
    L, D = codes.shape
    smoothed = torch.empty_like(counts)
    launching.launch(
        counts_kernel,
        (1,),
        counts,
        batch_counts,
        dead,
        smoothed,
        L,
        decay,
        1 - decay,
        eps,
        RESET=reset,
        BLOCK_L=min(4096, triton.next_power_of_2(L)),
        num_warps=4,
    )
    block_l, block_d = 8, min(128, max(16, triton.next_power_of_2(D)))
    launching.launch(
        codes_kernel,
        (cdiv(L, block_l), cdiv(D, block_d)),
        codes,
        sums,
        batch_sums,
        dead,
        replacement,
        smoothed,
        L,
        D,
        decay,
        1 - decay,
        RESET=reset,
        BLOCK_L=block_l,
        BLOCK_D=block_d,
        num_warps=4,
    )
    for mine, theirs in zip((codes, sums, counts), written, strict=True):
        if mine is not theirs:
            theirs.copy_(mine)

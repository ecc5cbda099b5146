"""One step of the moving average (Eq. 7), including the reset, in one launch.

Every code is divided by a smoothed N, which needs the sum of all N. Instead of another launch or a
barrier, every program computes that sum: it adds all L counts in the same order, so that all get
the same bits. The number of programs is bounded, which keeps that cheap, and each then updates its
share of the codes. N changes in place while other programs read it, so the sum is taken of a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.ema import FADED
from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv

_PROGRAMS_PER_PROCESSOR = 2  # each reads all counts: no more than keep the memory busy


@triton.jit
def average_kernel(
    codes,  # fp32 [L, D], written
    sums,  # fp32 [L, D], written
    counts,  # fp32 [L], written
    before,  # fp32 [L]: the counts before the step
    batch_sums,  # [L, D]
    batch_counts,  # [L]
    dead,  # uint8 [L], or None
    replacement,  # [L, D], or None
    L,
    D,
    decay,
    gain,  # 1 - decay
    eps,
    FADED: tl.constexpr,  # times eps: a mean N that is too small for a reset code
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_D columns of blocks of BLOCK_L codes, a stride of programs apart."""
    batch = tl.zeros([BLOCK], tl.float32)
    moved = tl.zeros([BLOCK], tl.float32)
    moved_dead = tl.zeros([BLOCK], tl.float32)
    number_dead = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, L, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n = tl.load(batch_counts + at, mask=at < L, other=0).to(tl.float32)
        moved_here = decay * tl.load(before + at, mask=at < L, other=0.0) + gain * n
        batch += n
        moved += moved_here
        if RESET:
            is_dead = tl.load(dead + at, mask=at < L, other=0) != 0
            moved_dead += tl.where(is_dead, moved_here, 0.0)
            number_dead += tl.where(is_dead, 1.0, 0.0)
    end = tl.where(tl.sum(batch) > 0, L, 0)  # a batch without any vector changes nothing
    died = tl.sum(number_dead)
    mean_of_dead = tl.sum(moved_dead) / tl.maximum(died, 1.0)
    mass_of_dead = tl.maximum(mean_of_dead, tl.where(mean_of_dead > FADED * eps, 0.0, gain))
    total = tl.sum(moved) + (mass_of_dead - mean_of_dead) * died
    scale = total / (total + L * eps)

    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for start in tl.range(tl.program_id(0) * BLOCK_L, end, tl.num_programs(0) * BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L).to(tl.int64)
        n = tl.load(batch_counts + rows, mask=rows < L, other=0).to(tl.float32)
        count = decay * tl.load(before + rows, mask=rows < L, other=0.0) + gain * n
        inside = (rows < L)[:, None] & (columns < D)[None, :]
        cells = rows[:, None] * D + columns[None, :]
        s = tl.load(batch_sums + cells, mask=inside, other=0).to(tl.float32)
        new = decay * tl.load(sums + cells, mask=inside, other=0.0) + gain * s
        changed = n > 0  # a code that no vector chose stays
        if RESET:
            is_dead = tl.load(dead + rows, mask=rows < L, other=0) != 0
            count = tl.where(is_dead, mass_of_dead, count)
            changed = changed | is_dead
            there = inside & is_dead[:, None]
            revived = tl.load(replacement + cells, mask=there, other=0).to(tl.float32)
            new = tl.where(is_dead[:, None], revived * ((count + eps) * scale)[:, None], new)
        smoothed = (count + eps) * scale
        changed = changed & (smoothed > 0)  # so does a code without mass
        tl.store(counts + rows, count, mask=(rows < L) & (tl.program_id(1) == 0))
        tl.store(sums + cells, new, mask=inside)
        e = tl.div_rn(new, tl.broadcast_to(smoothed[:, None], new.shape))
        tl.store(codes + cells, e, mask=inside & changed[:, None])


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
    if codes.numel() == 0:
        return
    written = codes, sums, counts
    before = counts.clone()
    codes, sums, counts = state = [x.contiguous() for x in written]
    reset = dead is not None and replacement is not None
    dead = dead.contiguous().view(torch.uint8) if dead is not None else None
    replacement = replacement.contiguous() if replacement is not None else None
    batch = batch_sums.contiguous(), batch_counts.contiguous()
    L, D = codes.shape
    block_d = min(128, max(4, triton.next_power_of_2(D)))
    block_l, tiles = 2048 // block_d, cdiv(D, block_d)
    most = cdiv(_PROGRAMS_PER_PROCESSOR * launching.processors(codes), tiles)
    args = *state, before, *batch, dead, replacement, L, D, decay, 1 - decay, eps
    sizes = {"BLOCK": min(4096, triton.next_power_of_2(L)), "BLOCK_L": block_l, "BLOCK_D": block_d}
    options = {"FADED": FADED, "RESET": reset, **sizes, "num_warps": 8}
    launching.launch(average_kernel, (min(cdiv(L, block_l), most), tiles), *args, **options)
    for mine, theirs in zip(state, written, strict=True):  # of a strided one a copy
        if mine is not theirs:
            theirs.copy_(mine)

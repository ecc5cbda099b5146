"""What each vector adds to its code (Sec. 4.3): finiteness, partner and mixture, in one launch.

A program reads the vectors of its segments once for their norms and finiteness, and for each other
modality streams that modality's segments past them, with a softmax kept up to date: no `[T, S]`
tensor. It computes some columns of the result; the scores are made again for each of these blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.gpu.scalars import scalar
from mmvq_kernels.statistics import largest_fit


@triton.jit
def _look(rows, valid, at, there, D, limit, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Squared norms of rows `at`, and whether each may enter: valid, finite, not too large."""
    squares = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    unfit = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for start in tl.range(0, D, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = there[:, None] & (columns < D)[None, :]
        x = tl.load(rows + at[:, None] * D + columns[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
        unfit += tl.where(tl.abs(x) <= limit, 0, 1)  # of a NaN too
    fit = there & (tl.sum(unfit, axis=1) == 0)
    if valid is not None:
        fit = fit & (tl.load(valid + at, mask=there, other=0) != 0)
    return tl.sum(squares, axis=1), fit


@triton.jit
def mix_kernel(
    rows,  # [M B T, D]
    valid,  # uint8 [M B T], or None
    values,  # fp32 [M B T, D], out: (1 - w) z + w r
    owners,  # int64 [M B T], out: the group of a vector, -1 if it may not enter
    M,
    B,
    T,
    D,
    present,  # a bit for each group that has vectors here
    weight,
    temperature,  # of the products; None: the scores are cosines times `scale`
    scale,
    limit,  # of an element: larger ones cannot be squared
    POINTERS: tl.constexpr,  # whether weight and temperature are pointers
    PARTNER: tl.constexpr,  # "attention" | "aligned" | "none"
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns at a time, of a score
    BLOCK_D: tl.constexpr,  # columns of a program's own
    PRECISION: tl.constexpr,
):
    """Per program, BLOCK_D columns of BLOCK_T segments of one clip in one modality."""
    weight = scalar(weight, POINTERS)
    if temperature is not None:
        scale = 1 / scalar(temperature, POINTERS)
    blocks = tl.cdiv(T, BLOCK_T)
    clip = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = tl.program_id(1)
    own = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = (mine.to(tl.int64) * B + clip) * T + t
    there = t < T
    squares, fit = _look(rows, valid, at, there, D, limit, BLOCK_T, BLOCK_K)
    r = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    partners = tl.zeros([BLOCK_T], tl.float32)
    sound = tl.zeros([BLOCK_T], tl.float32)  # NaN where a softmax is
    if PARTNER == "aligned":
        for other in tl.range(0, M):
            if other != mine:
                place = (tl.cast(other, tl.int64) * B + clip) * T + t
                _, theirs = _look(rows, valid, place, there, D, limit, BLOCK_T, BLOCK_K)
                inside = theirs[:, None] & (own < D)[None, :]
                cells = place[:, None] * D + own[None, :]
                r += tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32)
                partners += theirs.to(tl.float32)
    if PARTNER == "attention":
        norms = tl.sqrt(squares)
        for other in tl.range(0, M):
            if other != mine:
                top = tl.full([BLOCK_T], -float("inf"), tl.float32)
                total = tl.zeros([BLOCK_T], tl.float32)
                mean = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                seen = tl.zeros([BLOCK_T], tl.int32)
                for first in tl.range(0, T, BLOCK_T):
                    s = first + tl.arange(0, BLOCK_T)
                    place = (tl.cast(other, tl.int64) * B + clip) * T + s
                    theirs, keys = _look(rows, valid, place, s < T, D, limit, BLOCK_T, BLOCK_K)
                    products = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
                    for start in tl.range(0, D, BLOCK_K):
                        columns = start + tl.arange(0, BLOCK_K)
                        z = tl.load(
                            rows + at[:, None] * D + columns[None, :],
                            mask=fit[:, None] & (columns < D)[None, :],
                            other=0.0,
                        )
                        k = tl.load(
                            rows + place[None, :] * D + columns[:, None],
                            mask=keys[None, :] & (columns < D)[:, None],
                            other=0.0,
                        )
                        z, k = z.to(tl.float32), k.to(tl.float32)
                        products = tl.dot(z, k, products, input_precision=PRECISION)
                    if temperature is None:
                        lengths = norms[:, None] * tl.sqrt(theirs)[None, :]
                        products = tl.where(lengths > 0, products / lengths, 0.0)
                    scores = tl.where(keys[None, :], products * scale, -float("inf"))
                    higher = tl.maximum(top, tl.max(scores, axis=1))
                    base = tl.where(higher == -float("inf"), 0.0, higher)  # no key so far
                    shrink = tl.exp(top - base)
                    p = tl.exp(scores - base[:, None])
                    v = tl.load(
                        rows + place[:, None] * D + own[None, :],
                        mask=keys[:, None] & (own < D)[None, :],
                        other=0.0,
                    )
                    mean = mean * shrink[:, None]
                    mean = tl.dot(p, v.to(tl.float32), mean, input_precision=PRECISION)
                    total = total * shrink + tl.sum(p, axis=1)
                    top = higher
                    seen += tl.sum(keys.to(tl.int32), axis=0)
                some = seen > 0
                share = 1 / total  # NaN or infinite where the scores are
                r += tl.where(some[:, None], mean * share[:, None], 0.0)
                sound += tl.where(some, share - share, 0.0)
                partners += some.to(tl.float32)
    inside = there[:, None] & (own < D)[None, :]
    cells = at[:, None] * D + own[None, :]
    z = tl.load(rows + cells, mask=inside, other=0.0).to(tl.float32)
    r = tl.where((partners > 0)[:, None], r / tl.maximum(partners, 1.0)[:, None], z)
    if PARTNER == "none":
        tl.store(values + cells, z, mask=inside)
    else:
        tl.store(values + cells, z * (1 - weight) + r * weight, mask=inside)
    if tl.program_id(2) == 0:
        number = tl.cast(0, tl.int64)  # of the group: the mine-th bit that is set
        before = tl.cast(0, tl.int64)
        for group in tl.range(0, 63):
            bit = (tl.cast(present, tl.int64) >> group) & 1
            number += tl.where(before + bit <= mine, 1, 0)
            before += bit
        enters = fit & (sound == 0)
        tl.store(owners + at, tl.where(enters, number, -1), mask=there)


def mix(
    rows: Tensor,
    valid: Tensor | None,
    clips: int,
    groups: list[int],
    partner: str,
    weight: float,
    temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """`mmvq.partners.contributions` for equal T, on a GPU, for dtypes up to float32."""
    rows = rows.contiguous()
    (N, D), M = rows.shape, len(groups)
    values = torch.empty_like(rows, dtype=torch.float32)
    owners = rows.new_empty(N, dtype=torch.long)
    if rows.numel() == 0:
        return values, owners.fill_(-1)
    T = N // (M * clips)
    if M == 1 or (isinstance(weight, float) and weight == 0):
        partner = "none"
    block_t = 16 if T <= 16 else 32
    block_d = min(64 if block_t == 16 else 32, max(16, triton.next_power_of_2(D)))
    attends = partner == "attention"
    launching.launch(
        mix_kernel,
        (clips * cdiv(T, block_t), M, cdiv(D, block_d)),
        rows,
        launching.as_bytes(valid),
        values,
        owners,
        M,
        clips,
        T,
        D,
        sum(1 << group for group in groups),
        weight,
        temperature,
        D**0.5,
        largest_fit(rows.dtype),
        POINTERS=isinstance(weight, Tensor),
        PARTNER=partner,
        BLOCK_T=block_t,
        BLOCK_K=16,
        BLOCK_D=block_d,
        PRECISION="tf32x3" if attends else "",
        num_warps=4,
        num_stages=2,
    )
    return values, owners

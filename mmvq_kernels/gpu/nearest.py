"""Nearest code (Eq. 2) as one fused search: no `[N, L]` tensor, not even a block of one.

`centre_kernel` makes what the search needs of the codebook: codes about their mean, half-norms and
a hash of each row, by which repeated rows are found. `search_kernel` streams the codes past a block
of vectors and keeps the smallest score `h - x . e` and its index. Few vectors leave a GPU idle, so
then the codes are split over programs, which meet in one integer atomic minimum of (score, index)
packed into 64 bits: the result does not depend on the order in which they arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mmvq_kernels.gpu import launching
from mmvq_kernels.gpu.launching import cdiv
from mmvq_kernels.hashing import repeats_an_earlier_key
from mmvq_kernels.rounding import rounded_mean

_LAST = torch.iinfo(torch.int64).max
_PROGRAMS_PER_PROCESSOR = 4  # enough to hide latency; fewer, and the codes are split


@triton.jit
def _mix(z):
    """splitmix64 of uint64, as `hashing.mix`."""
    z = z * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def centre_kernel(
    codebook,  # [L, D]
    mean,  # fp32 [D], NaN if a code is not finite
    codes,  # fp32 [L, D], out: e - mean, 0 where e is not finite
    half_norm,  # fp32 [L], out: |e - mean|^2 / 2 + mean . (e - mean), inf if e is not finite
    keys,  # int64 [L], out: equal for equal rows
    L,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per program, BLOCK_L rows of the codebook.

    Without a mean, the codes are centred about the first finite value of each column.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    products = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    key = tl.zeros([BLOCK_L], tl.uint64)
    unfit = tl.zeros([BLOCK_L], tl.int32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < L)[:, None] & (columns < D)[None, :]
        cells = rows[:, None] * D + columns[None, :]
        e = tl.load(codebook + cells, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + columns, mask=columns < D, other=0.0)
        row = 0
        while (row < L) & (tl.max((m - m != 0).to(tl.int32), axis=0) > 0):
            other = tl.load(codebook + row * D + columns, mask=columns < D, other=0.0)
            m = tl.where(m - m != 0, other.to(tl.float32), m)
            row += 1
        finite = e - e == 0
        unfit += tl.sum((e - e != 0).to(tl.int32), axis=1)
        centred = tl.where(inside & finite, e - m[None, :], 0.0)
        tl.store(codes + cells, centred, mask=inside)
        products += centred * (centred * 0.5 + m[None, :])
        bits = tl.where(e == 0, 0.0, e).to(tl.uint32, bitcast=True).to(tl.uint64)  # one zero
        mixed = _mix(bits + _mix((columns + 1).to(tl.uint64))[None, :])
        key += tl.sum(tl.where(inside, mixed, 0), axis=1)
    norms = tl.where(unfit == 0, tl.sum(products, axis=1), float("inf"))
    tl.store(half_norm + rows, norms, mask=rows < L)
    tl.store(keys + rows, key.to(tl.int64, bitcast=True), mask=rows < L)


@triton.jit
def search_kernel(
    x,  # [N, D]
    codes,  # fp32 [L, D], centred
    half_norm,  # fp32 [L], inf for a code that is never to win
    out,  # int64 [N]: the index; with SPLIT (score, index) packed, to be made smaller
    N,
    L,
    D,
    codes_per_program,  # a multiple of BLOCK_L
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,  # "tf32x3" ("ieee" on AMD) | "tf32" | "bf16"
    SPLIT: tl.constexpr,
):
    """Per program, BLOCK_N vectors against `codes_per_program` codes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * codes_per_program
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for start in tl.range(first, tl.minimum(first + codes_per_program, L), BLOCK_L):
        candidates = start + tl.arange(0, BLOCK_L)
        products = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        for column in tl.range(0, D, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            vectors = tl.load(
                x + rows[:, None] * D + columns[None, :],
                mask=(rows < N)[:, None] & (columns < D)[None, :],
                other=0.0,
            )
            tile = tl.load(  # the codes are read transposed
                codes + candidates.to(tl.int64)[None, :] * D + columns[:, None],
                mask=(candidates < L)[None, :] & (columns < D)[:, None],
                other=0.0,
            )
            if PRECISION == "bf16":
                products = tl.dot(vectors.to(tl.bfloat16), tile.to(tl.bfloat16), products)
            else:
                vectors = vectors.to(tl.float32)
                products = tl.dot(vectors, tile, products, input_precision=PRECISION)
        h = tl.load(half_norm + candidates, mask=candidates < L, other=float("inf"))
        scores = h[None, :] - products
        scores = tl.where(scores == scores, scores, -float("inf"))  # NaN, as argmin ranks it
        smallest, place = tl.min(scores, axis=1, return_indices=True)  # the first of equals
        index = tl.where(smallest < best, start + place, index)
        best = tl.minimum(smallest, best)
    finite = (best > -float("inf")) & (best < float("inf"))
    index = tl.where(finite, index, 0).to(tl.int64)
    if SPLIT:
        bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)  # one zero
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the floats are
        packed = (ordered.to(tl.int64) << 32) | index
        tl.atomic_min(out + rows, packed, mask=rows < N, sem="relaxed")
    else:
        tl.store(out + rows, index, mask=rows < N)


def search(x: Tensor, codebook: Tensor, *, fast: bool = False) -> Tensor:
    """`mmvq_kernels.nearest_code` on a GPU, for dtypes up to float32."""
    padding = (0, -x.shape[1] % 16)  # matrix instructions and 16-byte loads want a multiple of 16
    x, codebook = (
        pad(rows, padding) if padding[1] else rows.contiguous() for rows in (x, codebook)
    )
    (N, D), L = x.shape, codebook.shape[0]
    codes, half_norm = centre(codebook)

    precision = "tf32x3" if not fast else "bf16" if x.dtype == torch.bfloat16 else "tf32"
    wide = N >= 128 * launching.processors(x)  # enough blocks of 128 rows for every processor
    block_n, block_l, warps = (128, 64, 8) if wide else (64, 64, 4)
    blocks = cdiv(N, block_n)
    splits = min(
        cdiv(L, block_l), _PROGRAMS_PER_PROCESSOR * launching.processors(x) // max(blocks, 1)
    )
    split = not wide and splits > 1
    share = cdiv(cdiv(L, block_l), splits) * block_l if split else cdiv(L, block_l) * block_l
    out = x.new_full((N,), _LAST, dtype=torch.long) if split else x.new_empty(N, dtype=torch.long)
    launching.launch(
        search_kernel,
        (blocks, cdiv(L, share)),
        x,
        codes,
        half_norm,
        out,
        N,
        L,
        D,
        share,
        BLOCK_N=block_n,
        BLOCK_L=block_l,
        BLOCK_D=16 if D == 16 else 64 if precision == "bf16" else 32,
        PRECISION=precision,
        SPLIT=split,
        num_warps=warps,
        num_stages=3,
    )
    return out.bitwise_and_(0xFFFFFFFF) if split else out


def centre(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes about their mean `[L, D]` and half-norms `[L]`, infinite where a row repeats."""
    L, D = codebook.shape
    mean = rounded_mean(codebook.float())
    codes = codebook.new_empty((L, D), dtype=torch.float32)
    half_norm, keys = codes.new_empty(L), codes.new_empty(L, dtype=torch.long)
    block_d = min(64, triton.next_power_of_2(D))
    block_l = 1024 // block_d
    launching.launch(
        centre_kernel,
        (cdiv(L, block_l),),
        codebook,
        mean,
        codes,
        half_norm,
        keys,
        L,
        D,
        BLOCK_L=block_l,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return codes, half_norm.masked_fill_(repeats_an_earlier_key(keys), torch.inf)
